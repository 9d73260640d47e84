"""Conditions of two records, and the figures that can be compared under them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from colt5_bench.records import provenance
from colt5_bench.records.results import Record, Run


@dataclass(frozen=True)
class Conditions:
    """Conditions of a record that decide what it can be compared with."""

    kind: str
    """`cpu` or `cuda`."""

    device: str
    """Model name."""

    threads: int | None
    torch: str | None
    triton: str | None
    revision: str | None
    """Revision, with a plus and a hash if there are uncommitted changes."""

    @classmethod
    def of(cls, record: Record, run: Run) -> "Conditions":
        environment = run.environments.get(record.environment, {})
        return cls(
            kind="cuda" if environment.get("gpu") else "cpu",
            device=record.device,
            **{name: environment.get(name) for name in ("threads", "torch", "triton")},  # type: ignore[arg-type]
            revision=provenance.named(environment.get("git")),
        )


@dataclass(frozen=True)
class Pairing:
    """The conditions of a record in the baseline and in the run."""

    before: Conditions
    after: Conditions
    any_machine: bool = False
    """True if hardware with the same name counts as different machines."""

    @property
    def kind(self) -> str:
        return self.after.kind

    @property
    def same_kind(self) -> bool:
        return self.before.kind == self.after.kind

    @property
    def same_device(self) -> bool:
        return self.same_kind and self.before.device == self.after.device

    @property
    def same_parallelism(self) -> bool:
        """Relative speeds of calls depend on their number of threads."""
        return self.same_kind and (self.kind == "cuda" or self.before.threads == self.after.threads)

    @property
    def times(self) -> bool:
        return self.same_device and self.same_parallelism and not self.any_machine

    @property
    def speed_ups(self) -> bool:
        """True if speed-ups are compared instead of times."""
        return self.same_parallelism and not self.times

    @property
    def memory(self) -> bool:
        """Memory depends on the number of multiprocessors of a GPU, by which work is divided."""
        return self.same_device or (self.same_kind and self.kind == "cpu")

    @property
    def kernels(self) -> bool:
        return self.before.triton == self.after.triton

    def notes(self) -> Iterator[str]:
        """Notes on differences, and their consequences."""
        before, after = self.before, self.after
        if not self.same_parallelism:
            yield (
                f"the baseline was measured with {before.threads} threads and this run with {after.threads}: neither "
                "times nor speed-ups are compared"
            )
        elif not self.same_device:
            yield (
                f"the baseline was measured on {before.device} and this run on {after.device}: speed-ups over the "
                f"reference are compared instead of times{'' if self.memory else ', and memory is not compared'}"
            )
        elif self.any_machine:
            yield "speed-ups over the reference are compared instead of times, as with --any-machine"
        if before.torch != after.torch:
            yield f"the baseline was measured with torch {before.torch}, this run with torch {after.torch}"
        if not self.kernels:
            yield (
                f"the baseline was measured with Triton {before.triton} and this run with Triton {after.triton}: facts "
                "of compiled kernels are not compared"
            )


def notes_on(pairings: Iterable[Pairing]) -> list[str]:
    """All differences, each once."""
    return list(dict.fromkeys(note for pairing in pairings for note in pairing.notes()))
