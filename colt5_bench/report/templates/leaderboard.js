/* Points that hold all words that are searched for, with the name of their suite and machines. */

const points = [...document.querySelectorAll(".board tbody tr")].map((row) => {
  const board = row.closest("section"), heading = find("h2", board).textContent;
  return { row, board, text: `${heading} ${row.textContent}`.toLowerCase() };
});

function filter() {
  const words = wordsOf(find("#words").value);
  for (const point of points) point.row.hidden = !words.every((word) => point.text.includes(word));
  for (const board of document.querySelectorAll("#boards section")) board.hidden = !find(".board tbody tr:not([hidden])", board);
  const shown = points.filter((point) => !point.row.hidden).length;
  find("#count").textContent = `${shown.toLocaleString("en")} of ${points.length.toLocaleString("en")} points`;
}

find("#filters").addEventListener("submit", (event) => event.preventDefault());
find("#words").addEventListener("input", filter);
filter();
