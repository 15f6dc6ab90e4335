"""The kinds of input that fuzzing makes, each with a strict reader of its own that says what kvopt must come to.

A kind is a function of a ``random.Random`` and the case's empty folder: it writes the input and returns what the child
does with it, and a check of what it printed. Readers here share no code with kvopt.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.campaigns.damage import DEPTHS, ODD_TEXTS, change_bytes, change_for, change_lines, change_value, odd

Run = Callable[[Path], None]
Check = Callable[[str], str | None]
Kind = Callable[[Random, Path], tuple[Run, Check]]

TEXT = "Sort the message into one label.\nLabels: weather, music, book.\nMessage: {{text}}\nLabel:\n"
SLOT_NAMES = ("text", "note", "a.b", "x_1", "A-b")
PIECES = (
    "Read it. ", "{", "}", "{ {", "%s ", "$x ", "\\", "\\\\", "\n", "{{}}", "{{1x}}", "{{ a b }}", "{{x", "}}", "é",
    "\u2028", "👩\u200d👩\u200d👧", "\u202e", "<b>", "{% if %}", "\ufeff", "\x00",
)  # fmt: skip


# ---- what the child does


def command(*arguments: str) -> Run:
    """A command of kvopt."""

    def run(folder: Path) -> None:
        sys.argv = ["kvopt", *arguments]
        from kvopt.cli import main

        main()

    return run


def call(function: Callable[[Path], Any]) -> Run:
    """A function whose result is printed as JSON, and whose errors are told as those of a command are."""

    def run(folder: Path) -> None:
        from kvopt.cli import _explain

        try:
            print(json.dumps(function(folder)))
        except Exception as error:
            _explain(error)
            raise

    return run


def anything(out: str) -> str | None:
    """No strict reader can say more than that it must not crash."""
    return None


def must_fail(reason: str) -> Check:
    return lambda out: f"accepted, though {reason}"


# ---- good inputs


@dataclass(frozen=True)
class Folders:
    """Good inputs, made once: a base, and a finished run with contexts, mutations, a student and evaluations."""

    base: Path
    job: Path
    run: Path
    loaded: Any

    @classmethod
    def made(cls, place: Path) -> Folders:
        from kvopt.base.loading import load_base
        from kvopt.config.document import load_config
        from kvopt.config.model import ModelConfig
        from kvopt.export.writing import export
        from kvopt.report import write_report
        from kvopt.run.run import Run
        from kvopt.train.commands import evaluate_all, train_students
        from tests.jobs import write_job
        from tests.tiny import save_tiny
        from tests.train.evaluated import student

        place.mkdir(parents=True)
        base = save_tiny(place / "base", "llama", "chatml")

        def change(config: dict[str, Any]) -> None:
            config["model"]["base"] = str(base)
            config["contexts"] = [config["contexts"][0] | {"steps": 1}, config["contexts"][2] | {"steps": 1}]
            config["students"] = [student("s1", "original")]
            config["evaluate"] = {"rows": 2, "max_new_tokens": 2, "resamples": 100, "metrics": ["exact-match"]}

        job = write_job(place / "job", change)
        config, base_dir = load_config(job)

        def opened() -> Run:
            return Run(config, base_dir, place / "job" / "runs" / "job", say=lambda line: None, bars=False)

        with opened().opened() as run:
            run.run()
        train_students(opened())
        with opened().opened() as run:
            evaluate_all(run)
        out = place / "job" / "runs" / "job"
        write_report([out], out)
        export(f"{out}#kv-8", "peft", place / "export")
        return cls(base, job, out, load_base(ModelConfig(base=str(base), dtype="float32", device="cpu")))

    def config(self, folder: Path, **changes: Any) -> Path:
        """A small config of plain text in ``folder``, with good data unless they are there already."""
        tree = {
            "name": "fuzz",
            "model": {"base": str(self.base), "dtype": "float32", "device": "cpu"},
            "template": {"text": TEXT},
            "data": {"train": "train.jsonl", "validation_fraction": 0.25, "limit": {"selection": 2}},
            "mutations": {"count": 0},
        } | changes
        path = folder / "kvopt.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), "utf-8")
        if not (folder / "train.jsonl").exists():
            (folder / "train.jsonl").write_bytes(good_rows())
        return path


def good_rows(columns: tuple[str, ...] = ("text",)) -> bytes:
    """Twelve rows of JSON lines with these columns."""
    rows = [{name: f"row {i} of {name}" for name in columns} | {"output": "music"} for i in range(12)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# ---- strict readers


def slots_of(source: str) -> list[str]:
    """Names of the slots of a template, each once, in order; read character by character."""
    found: list[str] = []
    at = 0
    while (start := source.find("{{", at)) >= 0:
        at = start + 1
        inner = start + 2
        while inner < len(source) and source[inner].isspace():
            inner += 1
        end = inner
        while end < len(source) and (
            source[end] in string.ascii_letters + "_" or (end > inner and source[end] in string.digits + ".-")
        ):
            end += 1
        close = end
        while close < len(source) and source[close].isspace():
            close += 1
        if end == inner or source[close : close + 2] != "}}":
            continue
        backslashes = 0
        while start - backslashes > 0 and source[start - backslashes - 1] == "\\":
            backslashes += 1
        if backslashes % 2 == 0:
            found.append(source[inner:end])
        at = close + 2
    return list(dict.fromkeys(found))


def cell(value: Any) -> str | None:
    """What a JSON value is as text; None for what is not text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return None if any("\ud800" <= c <= "\udfff" for c in value) else value
    return None if value is None or isinstance(value, list | dict) else str(value)


def json_rows(data: bytes) -> list[tuple[str, str]] | None:
    """(text, output) of every row of JSON lines; None where a strict reader refuses the file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def refused(name: str) -> Any:
        raise ValueError(name)

    rows = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(
                line.decode("utf-8"), object_pairs_hook=once, parse_constant=refused, parse_int=str, parse_float=str
            )
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        if "text" not in row or "output" not in row:
            return [] if {"messages", "conversations", "instruction"} & row.keys() else None
        pair = cell(row["text"]), cell(row["output"])
        if None in pair or not str(pair[1]).strip():
            return None
        rows.append((str(pair[0]), str(pair[1])))
    return rows or None


def csv_rows(data: bytes) -> list[tuple[str, str]] | None:
    """As :func:`json_rows`, of CSV."""
    try:
        table = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (csv.Error, ValueError):
        return None
    if not table or any(len(row) != len(table[0]) for row in table) or len(set(table[0])) < len(table[0]):
        return None
    if not {"text", "output"} <= set(table[0]) or not all(name.strip() for name in table[0]):
        return None
    at = table[0].index("text"), table[0].index("output")
    rows = [(row[at[0]], row[at[1]]) for row in table[1:]]
    return rows if rows and all(output.strip() for _, output in rows) else None


def without_checksum(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "checksum"}


def lost_checksum(path: Path) -> bool:
    """Whether the damage took the checksum away: what is left is read as an older version's."""
    try:
        return "checksum" not in json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True


def counts_fit(rows: list[tuple[str, str]] | None) -> Check:
    """Whether ``kvopt validate --json`` took every different row, and none that a strict reader refuses."""

    def check(out: str) -> str | None:
        if rows is None:
            return "accepted data that a strict reader refuses"
        taken = sum(json.loads(out)["rows"].values())
        least, most = len({text for text, _ in rows}), len(rows)
        return None if not rows or least <= taken <= most else f"took {taken} rows of {least} to {most}"

    return check


class Tags(HTMLParser):
    """Counts what a browser would run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += sum(name.startswith("on") for name, _ in attrs) + (tag in ("iframe", "object", "embed"))


# ---- kinds


def cases_of(good: Folders) -> dict[str, Kind]:
    """Every kind of input by name."""

    def template(chance: Random, folder: Path) -> tuple[Run, Check]:
        def slot() -> str:
            backslashes, space = chance.choice(("", "\\", "\\\\")), chance.choice(("", " ", "\t"))
            after = chance.choice(("", " "))
            return f"{backslashes}{{{{{space}{chance.choice(SLOT_NAMES)}{after}}}}}"

        parts = [chance.choice(PIECES) if chance.random() < 0.6 else slot() for _ in range(chance.randint(1, 12))]
        return written("Sort it. " + "".join(parts) + "\n", folder)

    def template_bytes(chance: Random, folder: Path) -> tuple[Run, Check]:
        return written(change_bytes(chance, TEXT.encode()), folder)

    def written(text: str | bytes, folder: Path) -> tuple[Run, Check]:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (folder / "t.txt").write_bytes(data)
        try:
            slots: list[str] | None = slots_of(data.decode("utf-8-sig"))
        except ValueError:
            slots = None
        (folder / "train.jsonl").write_bytes(good_rows(tuple(dict.fromkeys([*(slots or ()), *SLOT_NAMES]))))
        good.config(folder, template={"file": "t.txt"})

        def check(out: str) -> str | None:
            found = json.loads(out)["slots"]
            return None if found == slots else f"found the slots {found}, there are {slots}"

        return command("validate", "kvopt.yaml", "--json"), check

    def jsonl(chance: Random, folder: Path) -> tuple[Run, Check]:
        data = change_lines(chance, good_rows())
        (folder / "train.jsonl").write_bytes(data)
        good.config(folder)
        return command("validate", "kvopt.yaml", "--json"), counts_fit(json_rows(data))

    def table(chance: Random, folder: Path) -> tuple[Run, Check]:
        quoted = chance.choice(ODD_TEXTS).replace('"', '""').encode("utf-8", "replace")
        rows = [f"row {i},music".encode() for i in range(10)]
        data = b"text,output\n" + b"\n".join([*rows, b'"' + quoted + b'",book']) + b"\n"
        data = change_bytes(chance, data) if chance.random() < 0.8 else data
        (folder / "rows.csv").write_bytes(data)
        good.config(folder, data={"train": "rows.csv", "validation_fraction": 0.25, "limit": {"selection": 2}})
        return command("validate", "kvopt.yaml", "--json"), counts_fit(csv_rows(data))

    def config(chance: Random, folder: Path) -> tuple[Run, Check]:
        tree = yaml.safe_load(good.job.read_text("utf-8"))
        for name in ("train.jsonl", "validation.jsonl"):
            shutil.copy(good.job.parent / name, folder / name)
        known = set(tree) | {"seed", "shorten"}
        changed = change_value(chance, tree)
        (folder / "kvopt.yaml").write_text(
            yaml.safe_dump(changed, sort_keys=False, allow_unicode=True), "utf-8", errors="surrogatepass"
        )
        unknown = set(changed) - known if isinstance(changed, dict) else {"no mapping"}
        check = must_fail(f"it has the key {sorted(map(str, unknown))[0]!r}") if unknown else anything
        return command("validate", "kvopt.yaml", "--json"), check

    def config_text(chance: Random, folder: Path) -> tuple[Run, Check]:
        path = good.config(folder)
        data = path.read_bytes()
        for _ in range(chance.choice((1, 1, 3))):
            data = change_bytes(chance, data)
        path.write_bytes(data)
        try:
            is_mapping = isinstance(yaml.safe_load(data.decode("utf-8-sig")), dict)
        except Exception:
            is_mapping = False
        return command("validate", "kvopt.yaml", "--json"), anything if is_mapping else must_fail(
            "it is no YAML mapping"
        )

    def config_bomb(chance: Random, folder: Path) -> tuple[Run, Check]:
        path = good.config(folder)
        where = chance.choice(("name", "data", "template", "mutations", "contexts", "x"))
        depth = chance.choice(DEPTHS)
        if chance.random() < 0.5:
            levels = chance.choice((5, 9, 30, 200))
            lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
            lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
            text = "\n".join(lines) + f"\n{where}: *a{levels - 1}\n"
        else:
            text = f"{where}: " + chance.choice(("[", "{a: ")) * depth + "\n"
        kept = [line for line in path.read_text("utf-8").splitlines(keepends=True) if not line.startswith(f"{where}:")]
        path.write_text("".join(kept) + text if chance.random() < 0.5 else text + "".join(kept), "utf-8")
        return command("validate", "kvopt.yaml", "--json"), must_fail("it is a bomb")

    def assignment(chance: Random, folder: Path) -> tuple[Run, Check]:
        good.config(folder)
        keys = (
            "seed",
            "data.limit.train",
            "template.text",
            "mutations.count",
            "contexts.0.name",
            "model",
            "",
            "a.b.c",
            "name",
        )
        value = chance.choice(
            (str(odd(chance)), "[" * chance.choice(DEPTHS), "&a [*a]", "{a: b", "1e400", "!!python/none")
        )
        text = chance.choice(keys) + chance.choice(("=", "=", "")) + value
        text = text.replace("\x00", "").encode("utf-8", "replace").decode()
        return command("validate", "kvopt.yaml", "--set", text, "--json"), anything

    def variants(chance: Random, folder: Path) -> tuple[Run, Check]:
        good_variants = [{"text": TEXT.replace("Sort", verb)} for verb in ("Put", "File", "Place")] + [
            TEXT.replace("one", "a")
        ]
        data = b"".join(json.dumps(one).encode() + b"\n" for one in good_variants)
        for _ in range(chance.choice((1, 2))):
            data = change_lines(chance, data)
        name = chance.choice(("v.jsonl", "v.jsonl", "v.txt"))
        (folder / name).write_bytes(data)

        def search(folder: Path) -> Any:
            from kvopt.config.mutations import MutationsConfig
            from kvopt.mutate.generators.file import FileVariants
            from kvopt.mutate.search import accepted, mutate
            from kvopt.task.template import Template

            original = Template.from_text(TEXT)
            wanted = MutationsConfig(count=8, operators=("paraphrase",))
            generator = FileVariants(folder / name, original)
            made = mutate(original, wanted, generator=generator, journal=folder / "m.jsonl")
            return [m.template.text for m in accepted(made) if m.template]

        def check(out: str) -> str | None:
            wrong = [text for text in json.loads(out) if not isinstance(text, str) or slots_of(text) != ["text"]]
            return f"accepted {wrong[0]!r}" if wrong else None

        return call(search), check

    def journal(chance: Random, folder: Path) -> tuple[Run, Check]:
        shutil.copytree(
            good.job.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("reference", "scores")
        )
        path = folder / "runs" / "job" / "mutations.jsonl"
        path.write_bytes(change_lines(chance, path.read_bytes()))
        shutil.copy(path, folder / "m.jsonl")
        spec = chance.choice(("best-mutations:1", "random-mutations:2", "diverse-mutations:2", "m001"))
        rows = command("export-data", "job.yaml", "--out", "rows.jsonl", "--context", spec)

        def check(out: str) -> str | None:
            texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
            for line in (folder / "rows.jsonl").read_text("utf-8").splitlines():
                row = json.loads(line)
                prompt = json.dumps(row["prompt"], ensure_ascii=False)
                if not any(text in prompt for text in texts):
                    return f"a prompt without its value: {prompt[:200]}"
            return None

        return rows, check

    def damaged(chance: Random, source: Path, target: Path, ending: str = "") -> str:
        """A copy of a folder with one file damaged; returns its name."""
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file() and path.name.endswith(ending))
        path = chance.choice(files)
        if chance.random() < 0.06:
            path.unlink()
        else:
            path.write_bytes(change_for(path.name)(chance, path.read_bytes()))
        return str(path.relative_to(target))

    def context(chance: Random, folder: Path) -> tuple[Run, Check]:
        name = chance.choice(("kv-8", "soft-6"))
        file = damaged(chance, good.run / "contexts" / name, folder / name)

        def load(folder: Path) -> Any:
            from kvopt.contexts.adapter import read_record
            from kvopt.contexts.folder import load_context

            record = read_record(folder / name)
            facts = record.to_json() if record else None
            return [load_context(folder / name, good.loaded).sha256(), facts]

        def check(out: str) -> str | None:
            digest, facts = json.loads(out)
            wanted = json.loads((good.run / "contexts" / name / "kvopt.json").read_text())
            same = digest == wanted["content_sha256"] and facts == without_checksum(wanted)
            unchecked = file == "kvopt.json" and lost_checksum(folder / name / file)
            return None if same or unchecked else f"another context, after damage to {file}"

        return call(load), check

    def student(chance: Random, folder: Path) -> tuple[Run, Check]:
        source = folder / "source"
        shutil.copytree(good.run / "students" / "s1", source, ignore=shutil.ignore_patterns("evaluation*"))
        file = damaged(chance, source, folder / "s1")

        def weights(place: Path) -> Any:
            import torch

            from kvopt.train.student import load_student

            model = load_student(place, good.loaded).model
            with torch.no_grad():
                ids = torch.arange(5, 15)[None]
                return [model.eval()(input_ids=ids).logits.double().abs().sum().item()]

        def both(folder: Path) -> Any:
            return [weights(folder / "s1"), weights(source)]

        def check(out: str) -> str | None:
            mine, wanted = json.loads(out)
            return None if mine == wanted else f"other weights, after damage to {file}"

        return call(both), check

    def inspected(chance: Random, folder: Path) -> tuple[Run, Check]:
        sources = [good.run / "contexts" / "kv-8", good.run / "students" / "s1", good.base.parent / "export", good.run]
        source = chance.choice(sources)
        damaged(chance, source, folder / "it", ".json")

        def check(out: str) -> str | None:
            return None if json.loads(out)["what"] in ("context", "student", "export", "run") else "says nothing"

        return command("inspect", "it", "--json"), check

    def page(chance: Random, folder: Path) -> tuple[Run, Check]:
        damaged(chance, good.run, folder / "run", chance.choice((".json", ".jsonl", ".yaml", "leaderboard.json")))

        def check(out: str) -> str | None:
            tags = Tags((folder / "page.html").read_text("utf-8"))
            return (
                None if (tags.scripts, tags.handlers) == (2, 0) else f"{tags.scripts} scripts, {tags.handlers} handlers"
            )

        return command("compare", "run", "--out", "page.html"), check

    def run_again(chance: Random, folder: Path) -> tuple[Run, Check]:
        return again(chance, folder, chance.choice((".json", ".jsonl")))

    def stored(chance: Random, folder: Path) -> tuple[Run, Check]:
        return again(chance, folder, ".safetensors", chance.choice(("scores", "scores", "reference")))

    def again(chance: Random, folder: Path, ending: str, part: str = "") -> tuple[Run, Check]:
        shutil.copytree(good.job.parent, folder / "job")
        out = folder / "job" / "runs" / "job"
        if part:
            shutil.rmtree(out / part)
            damaged(chance, good.run / part, out / part, ending)
            if part == "reference":
                shutil.rmtree(out / "scores")  # which are all that reads it
        else:
            shutil.rmtree(out)
            damaged(chance, good.run, out, ending)
        wanted = json.loads((good.run / "leaderboard.json").read_text())

        def check(printed: str) -> str | None:
            board = json.loads((out / "leaderboard.json").read_text())
            return None if board == wanted else "another leaderboard"

        return command("run", "job/job.yaml", "--out", "job/runs/job", "--set", "students=[]", "--json"), check

    return {
        "template": template, "template bytes": template_bytes, "jsonl": jsonl, "csv": table, "config": config,
        "config text": config_text, "config bomb": config_bomb, "--set": assignment, "variants": variants,
        "mutations": journal, "context": context, "student": student, "inspect": inspected, "page": page,
        "run again": run_again, "stored": stored,
    }  # fmt: skip
