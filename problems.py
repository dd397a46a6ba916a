"""problems.py - named problem sets, fetched where they are published or read from a local file, as
files of prompts.

configs/problems.toml names the benchmarks and training sets of the paper: where each is published,
which of its fields is what, how it is evaluated. No problem is shipped with this repository.

    python problems.py list
    python problems.py settings aime24                  # lines for the config of evaluate.py
    python problems.py write aime24 data/aime24.jsonl
    python problems.py write imo_answerbench data/imo.jsonl --from answerbench_v2.csv
    python problems.py write polaris data/train.jsonl --pass-rate 0.1 0.9 \\
        --without aime24 aime25 math500 --local aime25=data/aime25.jsonl

A local file (.jsonl, .json, .csv, .parquet) has the set's own fields or this repository's "id",
"problem", "answer". Without one the set comes from the Hugging Face Hub, once, into the hub's own
cache; nothing fetched is ever run. Only parquet needs pyarrow (pip install pyarrow). Ids that are
missing or mere numbers become NAME-number, so that several sets can share a file.

`--without` makes a training set: it drops what overlaps a benchmark, and repetitions, says how many
and lists them with their partners in data/train.overlaps.jsonl:

    same    but for case, spaces, punctuation and LaTeX's spacing the statement is a benchmark's, or
            that of an earlier row
    near    it has half of the word 8-grams in common with a benchmark's problem (half of those of
            the shorter). Siblings with other numbers and shared boilerplate count, and are better
            lost than trained on; paraphrases and translations are not found
"""

import argparse
import base64
import csv
import dataclasses
import difflib
import fnmatch
import json
import pickletools
import re
import tomllib
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import durable
import hf
import options
import rollouts
import runtime
import sandbox
from options import key

TABLE = Path(__file__).with_name("configs") / "problems.toml"
MAX_FILE, MAX_TESTS, MAX_TEXT = 2**31, 2**28, 100_000  # bytes, bytes of a problem, characters
NGRAM, SHARED = 8, 0.5


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A table of configs/problems.toml."""

    repo: str = key(help="data set of the Hugging Face Hub")
    file: str = key(help="its files, as a pattern: data/test-*.parquet")
    held_by: str = key(help="who holds the problems; the set's licence")
    revision: str = key("main", "commit, or branch")
    problem: str = key("problem", "field of the statement")
    starter: str = key("", "field of the code that an answer is to complete")
    answer: str = key("answer", "field of the answer; empty: none, there are tests")
    answer_after: str = key("", "the answer is what follows this mark, in that field")
    id: str = key("", "field of the id; empty: numbered")
    tests: list[str] = key([], "fields of test cases: JSON, or packed as LiveCodeBench packs them")
    function: str = key("", "field of JSON with func_name, the function under test")
    pass_rate: str = key("", "field of the share of tries that were right: a number, or 3/8")
    size: int = key(0, "how many problems it is known to have; 0: not known")
    k: int = key(help="samples a problem, the K of AVG@K")
    temperature: float = key(help="of the samples")
    top_p: float = key(help="nucleus")
    max_new_tokens: int = key(help="longest response")
    prompt: str = key("{problem}\nPlease reason step by step, and put your final answer within "
                      "\\boxed{}.", "the user's turn, chat.template of evaluate.py")
    name: str = key("", "the table's own name")


def entries(file=TABLE):
    """Every set of the table: {name: Entry}."""
    with durable.reading(file, "see configs/problems.toml of the repository"):
        names = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        table = dataclasses.make_dataclass("Table", [(name, Entry) for name in names])
    sets = vars(options.read_config(table, file))
    for name, e in sets.items():
        for field, low, high in (("k", 1, None), ("temperature", 0, None), ("top_p", 0, 1),
                                 ("max_new_tokens", 1, None), ("size", 0, None)):
            options.in_range(f"{file}: {name}.{field}", getattr(e, field), least=low, most=high)
        if "{problem}" not in e.prompt:
            raise ValueError(f"{file}: {name}.prompt must contain {{problem}}")
        if bool(e.answer) == bool(e.tests):
            raise ValueError(f"{file}: {name} needs an answer field or tests, one of them")
    return {name: dataclasses.replace(e, name=name) for name, e in sets.items()}


def entry(name, file=TABLE):
    """The set of that name. ValueError names the nearest, and all there are."""
    sets = entries(file)
    if name not in sets:
        near = difflib.get_close_matches(name, sets, n=1, cutoff=0.0)
        raise ValueError(f"{file}: there is no problem set {name!r:.80}; did you mean "
                         f"{''.join(near)}? It has: {', '.join(sets)}")
    return sets[name]


# ---------------------------------------------------------------- reading


def rows(entry, path="", broken=None):
    """The problems of a set, from a local file or fetched: a list of {"id", "problem", "answer"},
    or of {"id", "problem", "tests"} for code; with "pass_rate" where the set has one.

    ValueError on a malformed row, unless `broken` is a list: it then takes the complaint.
    """
    found, seen, number = [], {}, 0
    for file in [Path(path)] if path else fetch(entry):
        for place, record in records(file):
            try:
                row = _row(entry, place, record, number)
            except ValueError as error:
                if broken is None:
                    raise
                broken.append(str(error))
                continue
            finally:
                number += 1
            if row["id"] in seen:
                raise ValueError(f"{place}: id {row['id']!r:.80} stands already at "
                                 f"{seen[row['id']]}")
            seen[row["id"]] = place
            found.append(row)
    if not found:
        raise ValueError(f"{path or entry.repo}: no problems")
    return found


def fetch(entry):
    """The set's files in the hub's cache, where they are put if need be."""
    from huggingface_hub import snapshot_download

    for local in (True, False):  # what lies in the cache needs no network
        files, reason = [], f"it has no file {entry.file}"
        try:
            folder = Path(snapshot_download(entry.repo, repo_type="dataset", local_files_only=local,
                                            revision=entry.revision, allow_patterns=[entry.file]))
            files = sorted(file for file in folder.rglob("*") if file.is_file() and fnmatch.fnmatch(
                file.relative_to(folder).as_posix(), entry.file))
        except Exception as error:  # the hub's client and its transport raise many kinds
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if files:
            return files
    raise ValueError(f"{entry.name}: {entry.file} of the data set {entry.repo} could not be "
                     f"fetched: {reason}. A local copy is read with --from FILE "
                     f"(--local {entry.name}=FILE after --without)")


def records(path):
    """Yield (place, dict) for each record of a file. ValueError names file and place."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: a problem set is one of {', '.join(READERS)}")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path}: larger than {MAX_FILE >> 20} MiB, which no problem set is")
    for place, record in READERS[path.suffix.lower()](path):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: not an object but {record!r:.80}")
        yield place, record


def _json(path):
    try:
        data = json.loads(hf.read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: must hold a list of objects, not {type(data).__name__}")
    return ((f"{path}, item {number}", record) for number, record in enumerate(data, 1))


def _csv(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, record in enumerate(reader, 1):
                if None in record or None in record.values():
                    raise ValueError(f"{path}, row {number}: has not as many cells as the header")
                yield f"{path}, row {number}", record
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not CSV: {error}") from None


def _parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: parquet is read by pyarrow, which is not installed (pip install "
                         "pyarrow); or give the set as JSON lines or CSV with --from") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        for number, record in enumerate((r for batch in batches for r in batch.to_pylist()), 1):
            yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not parquet: {str(error):.200}") from None


READERS = {".jsonl": rollouts.read_json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _row(entry, place, record, number):
    """A record, with the set's own fields or with ours, as a row."""
    own = entry.problem in record

    def field(theirs, ours):
        name = theirs if own else ours
        if name not in record:
            raise ValueError(f"{place}: there is no field {name!r}; "
                             f"its fields are {', '.join(map(str, record)):.200}")
        return record[name]

    if not own and "problem" not in record:
        field("", entry.problem)
    row = {"id": record.get(entry.id, record.get("id")),
           "problem": field(entry.problem, "problem")}
    if entry.answer:
        row["answer"] = field(entry.answer, "answer")
    if row["id"] is None or re.fullmatch(r"\d+", str(row["id"])):
        row["id"] = f"{entry.name}-{number if row['id'] is None else row['id']}"
    if own and entry.answer_after and isinstance(row["answer"], str):
        _, mark, row["answer"] = row["answer"].rpartition(entry.answer_after)
        if not mark:
            raise ValueError(f"{place}: {entry.answer} has no {entry.answer_after!r} "
                             "before the answer")
    row = {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
    rollouts.check_row(place, row)
    row |= {name: str(row[name]) for name in ("id", "answer") if name in row}
    if own and entry.starter and record.get(entry.starter):
        row["problem"] += f"\n\nStarter code:\n```python\n{record[entry.starter]}\n```"
    for name, value in row.items():
        if len(value) > MAX_TEXT:
            raise ValueError(f"{place}: {name} has {len(value)} characters, at most {MAX_TEXT}")
    if entry.tests:
        row["tests"] = _tests(entry, place, record) if own else field("", "tests")
        try:
            sandbox.read_tests(row["tests"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    rate = record.get(entry.pass_rate, record.get("pass_rate"))
    if rate is not None:
        row["pass_rate"] = _rate(place, rate)
    return row


def _rate(place, value):
    """A number in [0, 1], or the fraction "3/8"."""
    fraction = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", value) if isinstance(value, str) else None
    rate = int(fraction[1]) / int(fraction[2]) if fraction else value
    if not durable.number(rate, 0, 1):
        raise ValueError(f'{place}: the pass rate must be in [0, 1], or like "3/8", '
                         f"not {value!r:.80}")
    return rate


def _tests(entry, place, record):
    """Test cases as sandbox.py reads them: {"inputs", "outputs"}, with "fn_name" for a function.

    LiveCodeBench packs hidden cases as base64 of zlib of a pickle of JSON. A pickle can run
    anything, so it is not unpickled: it may be one text, which pickletools finds in it.
    """
    cases, function = [], None
    with durable.reading(place, "leave the row out, or fetch the set again"):
        for name in entry.tests:
            text = record[name]
            if not text.startswith("["):
                unpack = zlib.decompressobj()
                try:
                    packed = unpack.decompress(base64.b64decode(text, validate=True), MAX_TESTS)
                except zlib.error as error:
                    raise durable.Wrong(f"{name}: {error}") from None
                durable.require(unpack.eof, f"{name} is cut off, or unpacks to too much")
                text, = (value for _, value, _ in pickletools.genops(packed)
                         if isinstance(value, str))
            cases += json.loads(text)
        if entry.function:
            function = json.loads(record[entry.function]).get("func_name")
        durable.require(cases and all(
            isinstance(case, dict) and isinstance(case.get("input"), str)
            and isinstance(case.get("output"), str) for case in cases),
            "a test case must have the texts input and output")
    return {"inputs": [case["input"] for case in cases],
            "outputs": [case["output"] for case in cases],
            **({"fn_name": function} if function else {})}


# ---------------------------------------------------------------- a training set


def words(text):
    """The words, numbers and operators of a statement, without case, punctuation or layout."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\\(?:left|right|displaystyle|q?quad|text|textbf|mathrm|mbox|operatorname"
                  r"|[,;:! ])(?![a-z])", " ", text)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    return re.findall(r"[^\W\d_]+|\d+|[-+=<>/*^|]", text)


def overlaps(rows, others):
    """What of `rows` is in `others` = {set: rows}, or earlier in `rows` itself:
    {id: {"id", "set", "other", "kind": "same" or "near", "shared"}}.
    """
    first, index, size = {}, defaultdict(list), {}
    for name, problems in others.items():
        for row in problems:
            tokens, partner = words(row["problem"]), (name, row["id"])
            first.setdefault(" ".join(tokens), partner)
            grams = _grams(tokens)
            size[partner] = len(grams)
            for gram in grams:
                index[gram].append(partner)
    found = {}
    for row in rows:
        tokens = words(row["problem"])
        partner, kind, shared = first.setdefault(" ".join(tokens), ("", row["id"])), "same", 1.0
        if partner == ("", row["id"]):
            grams = _grams(tokens)
            count = Counter(other for gram in grams for other in index.get(gram, ()))
            shared, partner = max(((n / min(size[other], len(grams)), other)
                                   for other, n in count.items()), default=(0.0, None))
            kind = "near"
        if shared >= SHARED:
            found[row["id"]] = {"id": row["id"], "set": partner[0], "other": partner[1],
                                "kind": kind, "shared": round(shared, 3)}
    return found


def _grams(tokens):
    return {tuple(tokens[i:i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)}


# ---------------------------------------------------------------- commands


def settings(entry):
    """How the set is evaluated, as TOML for the config of evaluate.py."""
    return options.to_toml({
        "max_new_tokens": entry.max_new_tokens, "pass_at": sorted({1, entry.k}),
        "sampling": [{"name": f"AVG@{entry.k}", "temperature": entry.temperature,
                      "top_p": entry.top_p, "n": entry.k}],
        "chat": {"template": entry.prompt}})


def write(args):
    """The command of that name: a set as a file of prompts."""
    e, broken = entry(args.name), [] if args.skip_broken else None
    local = dict(pair.partition("=")[::2] for pair in args.local)
    if strange := sorted(set(local) - set(args.without or ())):
        raise ValueError(f"--local {strange[0]}: not one of the sets after --without")
    problems = rows(e, args.source, broken)
    print(f"{e.name}: {len(problems)} problems (held by {e.held_by})")
    if e.size not in (0, len(problems)):
        print(f"note: {e.name} is known to have {e.size} problems")
    if broken:
        print(f"{len(broken)} malformed left out; the first: {broken[0]}")
    if args.pass_rate:
        low, high = args.pass_rate
        if unknown := [row["id"] for row in problems if "pass_rate" not in row]:
            raise ValueError(f"{e.name}: {len(unknown)} problems have no pass rate, {unknown[0]} "
                             "is the first; leave --pass-rate out")
        kept = [row for row in problems if low <= row["pass_rate"] <= high]
        print(f"{len(problems) - len(kept)} with a pass rate outside [{low:g}, {high:g}]")
        problems = kept
    if args.without is not None:
        others = {name: rows(entry(name), local.get(name, "")) for name in args.without}
        found = overlaps(problems, others)
        problems = [row for row in problems if row["id"] not in found]
        count = Counter((hit["set"], hit["kind"]) for hit in found.values())
        for name in others:
            print(f"{count[name, 'same']} the same as one of {name}, {count[name, 'near']} near")
        print(f"{count['', 'same']} the same as an earlier one")
        _write_lines(Path(args.output).with_suffix(".overlaps.jsonl"), found.values())
    if not problems:
        raise ValueError(f"{e.name}: no problem is left to write")
    _write_lines(args.output, problems)
    print(f"{args.output}: {len(problems)} prompts")


def _write_lines(path, lines):
    durable.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the sets there are")
    commands.add_parser("settings", help="how a set is evaluated").add_argument("name")
    writing = commands.add_parser("write", help="a set as a file of prompts")
    writing.add_argument("name", help="of the set")
    writing.add_argument("output", help="JSONL file of prompts to write")
    writing.add_argument("--from", dest="source", default="", metavar="FILE",
                         help="a local copy of the set, instead of fetching it")
    writing.add_argument("--pass-rate", nargs=2, type=float, metavar=("LOW", "HIGH"),
                         help="keep what was solved this often, bounds included")
    writing.add_argument("--without", nargs="*", metavar="NAME",
                         help="drop what overlaps these sets, and duplicates")
    writing.add_argument("--local", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                         help="local copies of sets named after --without")
    writing.add_argument("--skip-broken", action="store_true", help="leave malformed rows out")
    args = parser.parse_args()
    if args.command == "write":
        write(args)
    elif args.command == "settings":
        print(settings(entry(args.name)), end="")
    else:
        for name, e in entries().items():
            print(f"{name:18} AVG@{e.k:<3} T {e.temperature:<4g} top-p {e.top_p:<5g} "
                  f"{e.max_new_tokens:6} tokens  {e.size:6} problems  {e.repo}")


if __name__ == "__main__":
    runtime.command(main)
