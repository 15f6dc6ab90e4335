"""A run: the order of its stages and the folder that keeps what they make. Each can be killed and taken up again.

Nothing here is made by looking at an attribute: every stage is a call, which makes what it needs first and remembers it
while the run lives. The stages themselves are functions (``stages.py``, ``scoring.py``, ``sampling.py``,
``leaderboard.py``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import yaml

from kvopt.base.launch import LAUNCH
from kvopt.base.loading import Base, load_base
from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config
from kvopt.config.names import ContextName, unknown_context
from kvopt.config.shortening import ShorteningConfig
from kvopt.console.progress import Progress
from kvopt.contexts.context import Context, TextContext
from kvopt.contexts.folder import TensorContext, load_context
from kvopt.documents.leaderboard_file import LeaderboardDocument, NoiseFloor
from kvopt.documents.manifest import RunManifest
from kvopt.errors import InputError
from kvopt.learning.descent import check_share
from kvopt.measure.moments import StoredMoments
from kvopt.measure.reference import Reference
from kvopt.measure.score import Score, TokenScores
from kvopt.mutate.mutation import Mutation
from kvopt.run import scoring, stages
from kvopt.run.answers import TaskMetrics, task_metrics
from kvopt.run.board import Board, Measures, carried_wordings, earlier_wordings, put_on_board
from kvopt.run.catalogue import Catalogue, accepted_mutation
from kvopt.run.directory import RunDirectory, Workspace
from kvopt.run.encoded_task import EncodedTask, encode_task
from kvopt.run.inputs import place_from, read_inputs
from kvopt.run.leaderboard import Entry
from kvopt.run.out_of_memory import halving
from kvopt.run.race import RaceResult, check_raced, race
from kvopt.run.ranking import checkpoint_chooser, place
from kvopt.run.sampling import make_samples
from kvopt.run.shorter_texts import Shortener, ShorterTexts
from kvopt.storage.files import write_text

RESOLVED = "# Every setting of this run; relative paths start at the folder of the config file that it was given.\n"


class Run:
    """One config in one run directory.

    Args:
        config: as read by ``load_config``; ``base_dir`` is the folder that its paths are relative to.
        out: the run directory.
        say: gets a line for each stage; default: stderr.
        bars: whether progress bars are shown (None: only on a terminal).

    Attributes:
        inputs: config, template and data, read and checked.
        at: the run directory with the progress of this run.
    """

    def __init__(
        self,
        config: Config,
        base_dir: Path,
        out: Path,
        *,
        say: Callable[[str], None] | None = None,
        bars: bool | None = None,
    ) -> None:
        say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        progress = Progress(say, bars)
        self.at = Workspace(RunDirectory(out, say=progress.say), progress)
        self.inputs = read_inputs(config, base_dir)
        for warning in self.inputs.warnings:
            say(f"warning: {warning}")
        self._base: Base | None = None
        self._task: EncodedTask | None = None
        self._reference: Reference | None = None
        self._moments: StoredMoments | None = None
        self._mutations: list[Mutation] | None = None
        self._contexts: dict[str, TextContext] | None = None
        self._raced: RaceResult | None = None
        self._ranked: list[tuple[TextContext, Score]] | None = None
        self._learned: dict[str, TensorContext] = {}
        self._written: dict[str, TextContext] | None = None
        self._shorter: ShorterTexts | None = None
        self._metrics: TaskMetrics | None = None

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def directory(self) -> RunDirectory:
        return self.at.directory

    def follow(self) -> NoReturn:
        """Do what the first process of a launch, which alone writes, asks for, and exit when it has no more."""

        def task() -> EncodedTask:
            self.directory.read_manifest()  # as the first process left it
            return self.task()

        at = Workspace(self.directory, Progress(lambda line: None, False))
        shards = lambda: self.load_base().shards  # noqa: E731 (wanted before there is a manifest)
        LAUNCH.serve({"base": lambda: task().base, "task": task, "at": lambda: at, "shards": shards})

    # ---- what everything stands on

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Lock the directory, load the base, encode the data, and write what the run stands on: a fault before that
        leaves what was there.
        """
        with self.directory.locked():
            self._describe()
            LAUNCH.owns(base=self.load_base(), task=self.task(), at=self.at)
            yield self

    def use_base(self, base: Base) -> None:
        """Take a base that is loaded already, in place of loading the config's."""
        self._base, self._task = base, None

    def load_base(self) -> Base:
        """The config's base, loaded at the first call."""
        if self._base is None:
            self.at.say(f"base: {self.config.model.base}")
            self._base = load_base(self.config.model)
        return self._base

    def task(self) -> EncodedTask:
        """Template and data as the base sees them, encoded at the first call."""
        if self._task is None:
            began = self.directory.manifest.prompt_time
            self._task = encode_task(self.inputs, self.load_base(), datetime.fromisoformat(began) if began else None)
        return self._task

    def _describe(self) -> None:
        task, base = self.task(), self.load_base()
        for context in self.config.learned:
            task.check_window(context.name, context.tokens or 0)
            check_share(context, len(task.dataset.train))
        for warning in task.warnings:
            self.at.say(f"warning: {warning}")
        resolved = yaml.safe_dump(self.inputs.resolved(), sort_keys=False, allow_unicode=True)
        write_text(self.directory / "config.yaml", RESOLVED + resolved)
        manifest = RunManifest(
            seed=self.config.seed,
            device=str(base.device),
            threads=torch.get_num_threads(),
            dtype=str(base.dtype).removeprefix("torch."),
            base=base.document,
            template_sha256=task.template.sha256,
            data_sha256=task.dataset.sha256,
            tokens_sha256=task.encoded.sha256(),
            prompt_time=task.encoder.now.isoformat() if task.encoder.now else None,
            config_folder=place_from(self.directory.path, self.inputs.base_dir),
        )
        self.directory.describe(manifest)
        self.directory.device, self.directory.less_memory = base.device, partial(halving, self.config)

    # ---- stages

    def reference(self) -> Reference:
        """Hidden states of the base under the original template, for the rows that contexts are scored on: selection
        and validation rows, and those that were needed before.
        """
        dataset = self.task().dataset
        return self._reference_of({example.id for example in (*dataset.selection, *dataset.validation)})

    def descent_reference(self) -> Reference:
        """As :meth:`reference`, with the training rows that the config's contexts are learned on."""
        return self._reference_of(stages.drawn_rows(self.task()) | set(self.reference().index))

    def whole_reference(self) -> Reference:
        """As :meth:`reference`, for every row: students are trained on all of them."""
        self.descent_reference()  # rows are always added in this order, so the stored bytes do not depend on commands
        return self._reference_of({example.id for example in self.task().inputs.examples})

    def _reference_of(self, wanted: set[str]) -> Reference:
        if self._reference is None:
            self._reference = stages.make_reference(self.task(), self.at, wanted)
        elif self._reference.lacks(wanted):
            grown = stages.make_reference(self.task(), self.at, wanted)
            self._reference = grown.known_from(self._reference)
        return self._reference

    def moments(self) -> StoredMoments | None:
        """The reference's moments of the training rows, with ``reference.storage: moments``."""
        if self._moments is None and self.config.reference.storage == "moments":
            self._moments = stages.make_moments(self.task(), self.descent_reference(), self.at)
        return self._moments

    def mutations(self) -> list[Mutation]:
        """Every candidate tried, accepted or not."""
        if self._mutations is None:
            self._mutations = stages.make_mutations(self.task(), self.at, self.shorter_texts())
        return self._mutations

    def mutation_contexts(self) -> dict[str, TextContext]:
        """Accepted mutations as contexts, by name."""
        if self._contexts is None:
            self._contexts = stages.mutation_contexts(self.task(), self.mutations(), self.at)
        return self._contexts

    def raced(self) -> RaceResult:
        """What ``score.race`` leaves of the accepted mutations: all of them without a race."""
        if self._raced is None:
            contexts = list(self.mutation_contexts().values())
            self._raced = RaceResult(contexts, [])
            if self.config.score.race is not None:
                self._raced = race(self.task(), self.reference(), contexts, self.at)
        return self._raced

    def ranked_mutations(self) -> list[tuple[TextContext, Score]]:
        """Accepted mutations by forward KL on the selection rows, lowest first; or by what ``score.select`` says. With
        ``score.race``, those that the race left.
        """
        if self._ranked is None:
            contexts = self.raced().finalists
            scored = [
                (context, self.score(context, "selection"))
                for context in self.at.progress.over("scoring mutations", contexts)
            ]
            by = partial(place, self.config.score.select, self.task_metrics)
            self._ranked = sorted(scored, key=lambda pair: (*by(*pair), pair[0].name))
        return self._ranked

    def learned(self, only: Sequence[str] = ()) -> list[TensorContext]:
        """The contexts of the config, learned in order (or those named in ``only``, with what they start from)."""
        known = {context.name: context for context in self.config.learned}
        for name in only:
            if name not in known:
                raise InputError(f"no context {name!r} in the config", fix="known: " + (", ".join(known) or "none"))
        return [self._learn(known[name]) for name in only or known]

    def _learn(self, config: ContextConfig) -> TensorContext:
        if config.name not in self._learned:
            ids, source = self._start_of(config)
            self._learned[config.name] = stages.make_learned(
                self.task(),
                config,
                ids,
                source,
                self._reference_for(config),
                self.moments(),
                self.at,
                choose=checkpoint_chooser(self.config.score.select, self.task_metrics),
            )
        return self._learned[config.name]

    def _reference_for(self, config: ContextConfig) -> Reference:
        return self.descent_reference() if config.steps else self.reference()

    def shortener(self, config: ShorteningConfig) -> Shortener:
        """A search for shorter texts of the template."""
        return Shortener(self.task(), self.reference(), config, self.at)

    def shorter_texts(self) -> ShorterTexts:
        """The shorter texts that the config asks for; each is searched for when it is first needed."""
        if self._shorter is None:
            self._shorter = ShorterTexts(self.task(), self.reference, self.at)
        return self._shorter

    def _start_of(self, config: ContextConfig) -> tuple[Sequence[int], TensorContext | None]:
        """Token ids of the text that a context starts from, and the context where it starts from one."""
        if (text := config.start.text) is not None:
            return self.shorter_texts().start(text, f"contexts.{config.name}.init"), None
        name = config.start.source
        if name is None:
            return self.task().start_ids, None
        if name.form == "counted" and not self.ranked_mutations():
            raise InputError("no mutation was accepted", where="init: best-mutation", fix="raise mutations.count")
        [context] = self.catalogue([name]).named(name, "init")
        if isinstance(context, TextContext):
            return context.encoded.prefix, None
        assert isinstance(context, TensorContext)
        return (), context

    # ---- contexts by name

    def written(self) -> dict[str, TextContext]:
        """Wordings of the user's own, by name: those of the config, and those that ``kvopt score`` put on the board.
        Raises SeamError where a gold output has other ids under one of the config's.
        """
        if self._written is None:
            task = self.task()
            own = {name: task.text_context(name, template) for name, template in self.inputs.written.items()}
            self._written = own | carried_wordings(task, self.at, taken={*own, *self.inputs.context_names})
        return self._written

    def catalogue(self, names: Iterable[ContextName]) -> Catalogue:
        """The contexts that these names can mean: mutations and learned contexts among them are made now."""
        names = list(names)
        for name in names:
            check_raced(self.config, name, "score.race")
        mutated = any(name.form in ("counted", "mutation") for name in names) and self.config.mutations.count > 0
        ranked = any(name.form == "counted" and name.order != "random" for name in names)
        limit = self.config.score.max_kl or math.inf
        wanted = [name.argument for name in names if name.argument in self.inputs.context_names]
        learned = {name: self.learned([name])[0] for name in dict.fromkeys(wanted)}
        return Catalogue(
            self.task(),
            self.mutation_contexts() if mutated else {},
            tuple(c.name for c, score in self.ranked_mutations() if score.kl_forward.mean <= limit) if ranked else (),
            learned,
            self.written(),
            self.at.say,
            whole=self.config.score.max_kl is not None,
        )

    def stored_contexts(self, spec: str) -> list[Context]:
        """The contexts that a ``--context`` names, as they are stored: nothing is made or learned."""
        name = ContextName.parse(spec, "--context")
        if name.form == "counted":
            raise unknown_context(
                spec,
                "--context",
                ["original", "none", *self.written(), *self.inputs.context_names],
                ("text", "mutations", "mutation", "plain"),
            )
        learned, mutations = {}, {}
        folder = self.directory / "contexts" / name.argument
        if name.argument in self.inputs.context_names and folder.is_dir():
            learned[name.argument] = load_context(folder, self.task().base, name=name.argument)
        mutation = accepted_mutation(self.directory / "mutations.jsonl", name.argument)
        if mutation is not None:
            mutations[name.argument] = self.task().mutation_context(mutation)
        catalogue = Catalogue(self.task(), mutations, (), learned, self.written(), self.at.say)
        return catalogue.named(name, "--context", folder=Path())

    # ---- scores

    def score(self, context: Context, split: str = "validation") -> Score:
        """A context's score on a split."""
        return scoring.score(self.task(), self.reference(), context, split, self.at)

    def token_scores(self, context: Context, split: str = "validation") -> TokenScores:
        """Per-token arrays of :meth:`score`."""
        return scoring.token_scores(self.task(), self.reference(), context, split, self.at)

    def noise_floor(self) -> NoiseFloor:
        """Forward KL of the original against itself through another batching."""
        return scoring.noise_floor(self.task(), self.reference(), self.at)

    def task_metrics(self) -> TaskMetrics:
        """The metrics of the config, for the base's answers under each context."""
        if self._metrics is None:
            self._metrics = task_metrics(self.task(), self.at)
        return self._metrics

    def measures(self) -> Measures:
        """What says how good a context is: its score, and the metrics of the base's answers under it."""
        select = partial(self.score, split="selection")
        return Measures(self.task(), self.task_metrics(), self.score, select, self.noise_floor(), self.at)

    def put_on_board(self, contexts: Sequence[Context]) -> LeaderboardDocument | None:
        """Put wordings of the user's own on the leaderboard, as :func:`kvopt.run.board.put_on_board` says."""
        return put_on_board(self.measures(), contexts)

    # ---- all of it

    def run(self, shown: Callable[[LeaderboardDocument], None] | None = None) -> LeaderboardDocument:
        """All stages, the cheapest first; returns the leaderboard as written to ``leaderboard.json``, which is written
        after every context.

        Args:
            shown: called with the leaderboard after each context.
        """
        task, best = self.task(), self.config.score.best
        shortened = {name for item in self.config.frontiers for name in item.texts}
        written = [context for name, context in self.written().items() if name not in shortened]
        board = Board(self.measures(), shown, earlier_wordings(task, self.at))
        at_once, later = stages.by_cost(task)
        board.add(task.original, task.none, *written)
        for config in at_once:
            board.add(self._learn(config))
        for context, selection in self.ranked_mutations()[:best]:
            board.add(context, selection=selection)
        board.unreported = [Entry.of(context, None, score) for context, score in self.ranked_mutations()[best:]]
        board.raced = self.raced()
        board.add(*self.shorter_texts().of_frontiers())
        for config in later:
            board.add(self._learn(config))
        document = board.finished()
        top = [context for context, _ in self.ranked_mutations()[: min(1, best)]]
        make_samples(task, self.reference(), top, self.learned(), self.token_scores, self.task_metrics(), self.at)
        stages.set_aside_others(task, self.reference(), self.at)
        return document
