"""The contexts of a run that are there, and finding them by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvopt.config.names import ContextName, unknown_context
from kvopt.contexts.adapter import adapter_config, read_record
from kvopt.contexts.context import Context, TextContext
from kvopt.contexts.folder import TensorContext, load_context
from kvopt.documents.validated import read_leaderboard
from kvopt.errors import InputError
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.mutate.orders import first_mutations
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import missing_file
from kvopt.task.template import Template
from kvopt.task.template_files import name_of_file, template_from_file


@dataclass(frozen=True)
class Catalogue:
    """Contexts by name; looking one up computes nothing but its tokens.

    Attributes:
        task: what they are contexts of.
        mutations: the accepted mutations, as contexts.
        ranked: their names by forward KL on the selection rows, lowest first, those up to ``score.max_kl``; empty where
            they are not scored.
        learned: the config's contexts that are learned.
        written: wordings of the user's own: those of the config, and those that were scored onto the board.
        say: gets a line where a context's base cannot be checked.
        whole: diverse-mutations looks at all that are ranked, not at the better half.
    """

    task: EncodedTask
    mutations: Mapping[str, TextContext] = field(default_factory=dict)
    ranked: tuple[str, ...] = ()
    learned: Mapping[str, TensorContext] = field(default_factory=dict)
    written: Mapping[str, TextContext] = field(default_factory=dict)
    say: Callable[[str], None] = field(default=lambda line: None)
    whole: bool = False

    def named(
        self,
        name: ContextName,
        where: str,
        *,
        folder: Path | None = None,
        seed: int = 0,
        taken: Collection[str] = (),
    ) -> list[Context]:
        """The contexts that a name stands for: one, or several for counted names and ``mutations:FILE``.

        Args:
            where: for messages.
            folder: what paths are relative to; default: the config's folder.
            seed, taken: of counted names, as in :func:`kvopt.mutate.orders.first_mutations`.

        Raises:
            InputError: there is no such context, or too few of them.
        """
        folder = self.task.inputs.base_dir if folder is None else folder
        match name.form:
            case "original":
                return [self.task.original]
            case "none":
                return [self.task.none]
            case "counted":
                return list(self._counted(name, where, seed, taken))
            case "text":
                return [self._text(folder / name.argument, name.argument)]
            case "mutations":
                return list(self._of_journal(folder / name.argument))
            case "mutation":
                return [self._mutation(name, where)]
            case "of-run":
                return [self._of_run(folder / name.run, name, where)]
            case _:
                return [self._plain(name, where, folder)]

    def _counted(self, name: ContextName, where: str, seed: int, taken: Collection[str]) -> list[TextContext]:
        names = first_mutations(
            name.order,
            name.count,
            {key: context.template for key, context in self.mutations.items()},
            lambda: self.ranked,
            self.task.template,
            seed=seed,
            taken=taken,
            where=f"{where} {name.spec}",
            whole=self.whole,
        )
        return [self.mutations[key] for key in names]

    def _text(self, path: Path, shown: str) -> TextContext:
        stem = name_of_file(shown)
        name = shown if stem in ("original", "none") else stem
        return self.task.text_context(name, template_from_file(path, self.task.template))

    def _of_journal(self, path: Path) -> list[TextContext]:
        if not path.is_file():
            raise missing_file(path, fix="give a mutations.jsonl")
        contexts = [self.task.mutation_context(m) for m in read_mutations(path) if m.accepted]
        if not contexts:
            raise InputError("holds no accepted mutation", where=str(path))
        return contexts

    def _mutation(self, name: ContextName, where: str) -> TextContext:
        if name.argument in self.mutations:
            return self.mutations[name.argument]
        raise InputError(f"no accepted mutation {name.argument!r}", where=where, fix="see mutations.jsonl for names")

    def _of_run(self, run: Path, name: ContextName, where: str) -> Context:
        folder = run / "contexts" / name.argument
        if folder.is_dir():
            return load_context(folder, self.task.base, name=name.argument)
        mutation = accepted_mutation(run / "mutations.jsonl", name.argument)
        wording = written_template(run, name.argument)
        if wording is not None:
            return self.task.text_context(name.argument, wording)
        if mutation is None:
            raise InputError(f"the run has no context {name.argument!r}", where=f"{where} {run}")
        return self.task.mutation_context(mutation)

    def _plain(self, name: ContextName, where: str, folder: Path) -> Context:
        if name.argument in self.written:
            return self.written[name.argument]
        if name.argument in self.learned:
            return self.learned[name.argument]
        place = folder / name.argument
        if place.exists():
            context = load_context(place, self.task.base)
            if read_record(place) is None:
                base = adapter_config(place).get("base_model_name_or_path")
                doubt = f"whether its base, {base}, is this one cannot be checked"
                self.say(f"warning: {name.argument} carries no hashes; {doubt}")
            return context
        names = self.task.inputs.context_names
        if name.argument in names:
            raise InputError("is not learned yet", where=name.argument, fix="kvopt run or kvopt optimize learns it")
        raise unknown_context(name.spec, where, ["original", "none", *self.written, *names])


def written_template(run: Path, name: str) -> Template | None:
    """The wording of that name on a run's leaderboard that is no mutation; None without it. Raises InputError for a
    damaged leaderboard.
    """
    path = run / "leaderboard.json"
    rows = read_leaderboard(path).contexts if path.is_file() else []
    row = next((row for row in rows if row.name == name and row.template is not None), None)
    return Template.from_json(row.template.to_json(), where=f"{path} {name}") if row and row.template else None


def accepted_mutation(journal: Path, name: str) -> Mutation | None:
    """The accepted mutation of that name in a journal; None without it. Raises InputError for a damaged journal."""
    mutations = read_mutations(journal) if journal.is_file() else []
    return next((m for m in mutations if m.accepted and m.name == name), None)
