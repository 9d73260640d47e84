"use strict";

const root = document.documentElement;
const find = (selector, within = document) => within.querySelector(selector);

/* Theme: that of the system until the button says otherwise, and light on paper. */

const dark = matchMedia("(prefers-color-scheme: dark)");
const remember = (theme) => { try { localStorage.setItem("theme", theme); } catch { /* a page from disk may have no storage */ } };
const remembered = () => { try { return localStorage.getItem("theme"); } catch { return null; } };

/** Called after each change of the theme. */
const onTheme = [];
let printing = false, choice = remembered();

function setTheme() {
  root.dataset.theme = printing ? "light" : choice ?? (dark.matches ? "dark" : "light");
  onTheme.forEach((call) => call());
}

setTheme();
dark.addEventListener("change", setTheme);
find("#theme").addEventListener("click", () => {
  choice = root.dataset.theme === "dark" ? "light" : "dark";
  remember(choice);
  setTheme();
});

/** Called before each change from or to paper. */
const onPrinting = [];

function setPrinting(on) {
  if (printing === on) return;
  printing = on;
  onPrinting.forEach((call) => call());
  setTheme();
}

addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));

/** The words of a search, each of which has to be there. */
const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
