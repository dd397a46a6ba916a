"""problems.py: the shipped table, every kind of file, fetching (a fake hub), malformed rows, test
cases, pass rates, overlaps, the written files."""

import base64
import csv
import json
import os
import pickle
import sys
import types
import zlib

import pytest
from conftest import ROOT

import options
import problems
import rollouts

SETS = ("aime24 aime25 hmmt_feb25 hmmt_nov25 hmmt_feb26 beyondaime imo_answerbench math500 gsm8k "
        "polaris livecodebench_v6").split()
MATH = [{"problem": f"What is ${i} + {i}$ in base {i + 7}?", "answer": str(2 * i)}
        for i in range(3)]


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(file, **keys):
    text = {"repo": "a/b", "file": "x.jsonl", "held_by": "me", "k": 1, "temperature": 1.0,
            "top_p": 1.0, "max_new_tokens": 9} | keys
    file.write_text("[mine]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in text.items()))
    return file


def write(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["problems.py", "write", *map(str, arguments)])
    problems.main()


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------- the table


def test_every_named_set(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # the table is found from anywhere
    sets = problems.entries()
    assert set(SETS) <= set(sets)
    k = {"beyondaime": 16, "imo_answerbench": 4}  # the paper's, 32 where it says nothing else
    for name in SETS[:7]:
        assert sets[name].k == k.get(name, 32)
        assert (sets[name].temperature, sets[name].top_p) == (0.6, 0.95)
    monkeypatch.setattr(sys, "argv", ["problems.py", "list"])
    problems.main()
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in SETS)


@pytest.mark.parametrize("name", SETS)
def test_settings_are_a_config_of_evaluate(name, tmp_path):
    import evaluate

    e = problems.entry(name)
    file = tmp_path / "evaluate.toml"
    file.write_text('base = "b"\nprompts = "p"\noutput = "o"\n' + problems.settings(e))
    config = options.read_config(evaluate.Config, file)
    assert config.chat.template == e.prompt and "{problem}" in e.prompt
    assert config.sampling[0].n == e.k and config.max_new_tokens == e.max_new_tokens


def test_a_wrong_name_and_a_wrong_table(tmp_path):
    with pytest.raises(ValueError, match="did you mean aime24\\? It has: aime24, aime25, "):
        problems.entry("aime-24")
    file = tmp_path / "t.toml"
    assert problems.entry("mine", table(file)).name == "mine"
    for keys, says in (({"repos": "x"}, "unknown key mine.repos; did you mean mine.repo"),
                       ({"k": "4"}, "key mine.k must be int"), ({"k": 0}, "mine.k must be at"),
                       ({"top_p": 2}, "mine.top_p must be"), ({"tests": ["t"]}, "one of them"),
                       ({"answer": ""}, "one of them"), ({"prompt": "x"}, "must contain {prob")):
        with pytest.raises(ValueError, match=says) as error:
            problems.entries(table(file, **keys))
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    for text, says in (("[mine]\nk = 1", "key mine.repo is missing"), ("x = 3", "a section"),
                       ("[", "damaged"), ("[a-b]\nk = 1", "valid identifiers")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            problems.entries(file)


# ---------------------------------------------------------------- files


def test_every_kind_of_file(tmp_path):
    e = problems.entry("imo_answerbench")
    text = 'a, "b"\n{c} %s \\frac12'
    own = [{"Problem ID": f"imo-{i}", "Problem": text, "Short Answer": "½", "Level": "x"}
           for i in range(3)]
    expected = [{"id": f"imo-{i}", "problem": text, "answer": "½"} for i in range(3)]
    jsonl = lines(tmp_path / "a.jsonl", own)
    (tmp_path / "a.json").write_text(json.dumps(own))
    with open(tmp_path / "a.CSV", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, own[0])
        writer.writeheader()
        writer.writerows(own)
    assert problems.rows(e, jsonl) == problems.rows(e, tmp_path / "a.json") == expected
    assert problems.rows(e, tmp_path / "a.CSV") == expected
    ours = lines(tmp_path / "ours.jsonl", [{"id": 7, "problem": "p", "answer": 3}])
    assert problems.rows(e, ours) == [{"id": "imo_answerbench-7", "problem": "p", "answer": "3"}]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    import pyarrow

    file = tmp_path / "a.parquet"
    rows = [{"problem_idx": i, "problem": f"p{i}", "answer": f"{i}"} for i in range(1500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    read = problems.rows(problems.entry("hmmt_feb25"), file)
    assert read[1400] == {"id": "hmmt_feb25-1400", "problem": "p1400", "answer": "1400"}
    file.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="a.parquet: not parquet"):
        problems.rows(problems.entry("hmmt_feb25"), file)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow.*or give the set as JSON lines"):
        problems.rows(problems.entry("aime24"), tmp_path / "a.parquet")


def test_gsm8k_answers_follow_their_mark(tmp_path):
    e, file = problems.entry("gsm8k"), tmp_path / "g.jsonl"
    lines(file, [{"question": "q", "answer": "1 + 1 = 2 #### no\n#### 2,125 "}])
    assert problems.rows(e, file) == [{"id": "gsm8k-0", "problem": "q", "answer": "2,125"}]
    lines(file, [{"problem": "q", "answer": "18"}])  # ours: extracted before
    assert problems.rows(e, file)[0]["answer"] == "18"
    lines(file, [{"question": "q", "answer": "18"}])
    with pytest.raises(ValueError, match="line 1: answer has no '####'"):
        problems.rows(e, file)


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", '{"problem": "p"}', "line 1: there is no field 'answer'; its fields are problem"),
    ("a.jsonl", '\n{"question": "p"}', "line 2: there is no field 'problem'"),
    ("a.jsonl", '{"problem": "", "answer": "1"}', "line 1: problem must be text, not empty"),
    ("a.jsonl", '{"problem": " ", "answer": "1"}', "line 1: problem must be text, not empty"),
    ("a.jsonl", '{"problem": ["p"], "answer": "1"}', "line 1: problem must be text"),
    ("a.jsonl", '{"problem": "p", "answer": null}', "line 1: answer must be text or a number"),
    ("a.jsonl", '{"problem": "p", "answer": [1]}', "line 1: answer must be text or a number"),
    ("a.jsonl", '{"problem": "p", "answer": true}', "line 1: answer must be text or a number"),
    ("a.jsonl", '{"problem": "p\\ud800", "answer": "1"}', "line 1: problem must be text"),
    ("a.jsonl", '{"id": {}, "problem": "p", "answer": "1"}', "line 1: id must be text or a number"),
    ("a.jsonl", '{"id": 1, "problem": "p", "answer": 1}\n' * 2, "line 2: id 'aime24-1' stands"),
    ("a.jsonl", '{"problem": "%s", "answer": "1"}' % ("x" * 100_001), "100001 characters"),
    ("a.jsonl", "[1]", "line 1: not a JSON object"), ("a.jsonl", "{", "line 1: not a JSON object"),
    ("a.jsonl", "", "no problems"), ("a.json", "{}", "must hold a list of objects, not dict"),
    ("a.json", "[1]", "item 1: not an object but 1"), ("a.json", "[", "not JSON"),
    ("a.json", "[" * 100_000, "not JSON"), ("a.csv", "problem,answer\na", "row 1: has not as many"),
    ("a.csv", "problem,answer\na,b,c", "row 1: has not as many"),
    ("a.csv", 'problem,answer\n"a"b,1', "after line 1: not CSV"), ("a.csv", b"\xff", "not CSV"),
    ("a.csv", "", "no problems"), ("a.txt", "x", "a problem set is one of .jsonl, .json, .csv"),
    ("../../etc", None, "there is no such file"), (".", None, "there is no such file")])
def test_malformed_files_get_one_clear_line(tmp_path, name, content, says):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        problems.rows(problems.entry("aime24"), file)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(file) in str(error.value) and len(str(error.value)) < 600


def test_too_large_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "MAX_FILE", 10)
    with pytest.raises(ValueError, match="larger than"):
        problems.rows(problems.entry("aime24"), lines(tmp_path / "a.jsonl", MATH))


# ---------------------------------------------------------------- fetching


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one folder; .calls are the options of each fetch, .offline leaves the cache."""
    fake = types.SimpleNamespace(folder=tmp_path / "hub", calls=[], cached=False, offline=False)
    fake.folder.mkdir()

    def snapshot_download(repo, **options):
        fake.calls.append((repo, options))
        if options["local_files_only"] and not fake.cached:
            raise FileNotFoundError("not in the cache")
        if fake.offline and not options["local_files_only"]:
            raise ConnectionError("no network.\nTry again.")
        return str(fake.folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(snapshot_download=snapshot_download))
    return fake


def test_a_set_is_fetched_by_name(hub):
    lines(hub.folder / "test.jsonl", [{"unique_id": f"t/{i}.json"} | row
                                      for i, row in enumerate(MATH)])
    lines(hub.folder / "other.jsonl", [{"x": 1}])
    assert problems.rows(problems.entry("math500"))[2] == {"id": "t/2.json"} | MATH[2]
    repo, options = hub.calls[-1]
    assert repo == "HuggingFaceH4/MATH-500" and options["repo_type"] == "dataset"
    assert options["allow_patterns"] == ["test.jsonl"] and len(options["revision"]) == 40
    hub.cached, hub.offline = True, True
    assert len(problems.rows(problems.entry("math500"))) == 3 and len(hub.calls) == 3


def test_offline_or_renamed_says_what_to_do(hub):
    for offline, says in ((False, "it has no file test.jsonl"), (True, "no network. Try again.")):
        hub.offline = offline
        with pytest.raises(ValueError) as error:
            problems.rows(problems.entry("math500"))
        assert says in str(error.value) and "\n" not in str(error.value)
        assert "A local copy is read with --from FILE" in str(error.value)


# ---------------------------------------------------------------- code


def pack(cases):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


CODE = {"question_id": "abc_1", "question_content": "Add.", "starter_code": "",
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
        "metadata": "{}"}


def test_livecodebench_is_unpacked(tmp_path):
    long, short = json.dumps("x" * 9**5), '"é"'
    e, hidden = problems.entry("livecodebench_v6"), [{"input": long, "output": short}] * 2
    file = lines(tmp_path / "t.jsonl", [
        CODE | {"private_test_cases": pack(hidden)},
        CODE | {"question_id": "2", "private_test_cases": pack(hidden), "starter_code": "class S:",
                "metadata": '{"func_name": "add"}'}])
    first, second = problems.rows(e, file)
    tests = {"inputs": ["1", long, long], "outputs": ["2", short, short]}
    assert first == {"id": "abc_1", "problem": "Add.", "tests": tests}
    assert second["id"] == "livecodebench_v6-2" and second["tests"] == tests | {"fn_name": "add"}
    again = lines(tmp_path / "again.jsonl", [first, second])
    assert problems.rows(e, again) == [first, second]
    assert second["problem"] == "Add.\n\nStarter code:\n```python\nclass S:\n```"


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_no_pickle_is_run_and_no_bomb_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "MAX_TESTS", 10_000)
    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    bomb = base64.b64encode(zlib.compress(b"0" * 10**6)).decode()
    for text in (evil, bomb, "", "no base64!", base64.b64encode(b"no zlib").decode(),
                 pack([])[:20], pack({"input": 1}), pack([1]), None,
                 pack([{"input": 1, "output": "2"}])):
        file = lines(tmp_path / "t.jsonl", [CODE | {"private_test_cases": text}])
        with pytest.raises(ValueError, match="t.jsonl, line 1: ") as error:
            problems.rows(problems.entry("livecodebench_v6"), file)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "was_run").exists()


# ---------------------------------------------------------------- a training set


def test_words_see_through_layout():
    same = ["Find $\\dfrac{1}{2} + x$, where\\,\\, $x>0$.",
            "find \\( \\frac{1}{2}+x \\) where x > 0",
            "FIND \\[\\tfrac{1}{2}  + x\\] \\quad where $\\left.x > 0\\right.$!"]
    assert len({" ".join(problems.words(text)) for text in same}) == 1
    for a, b in (("$x + 1$", "$x - 1$"), ("12", "21"), ("\\frac{1}{12}", "\\frac{11}{2}")):
        assert problems.words(a) != problems.words(b)


LONG = ("Every morning Aya goes for a nine kilometre long walk and stops at a coffee shop "
        "afterwards and drinks {} cups of tea while she reads a {} newspaper.")


def test_overlaps_the_same_near_and_repeated():
    others = {"bench": [{"id": "b0", "problem": LONG.format(3, "Greek")},
                        {"id": "b1", "problem": "What is 2?"}]}
    rows = [{"id": str(i), "problem": text} for i, text in enumerate((
        "what is  $2$ ?", LONG.format(3, "greek") + " How long is it?", LONG.format(4, "Dutch"),
        "A walk of nine kilometres, a coffee shop afterwards: a new problem.", "What is 3?",
        "WHAT IS 3", "", ""))]
    found = problems.overlaps(rows, others)
    assert {name: (hit["set"], hit["other"], hit["kind"]) for name, hit in found.items()} == {
        "0": ("bench", "b1", "same"), "1": ("bench", "b0", "near"), "2": ("bench", "b0", "near"),
        "5": ("", "4", "same"), "7": ("", "6", "same")}
    assert found["1"]["shared"] == 1.0 and 0.5 <= found["2"]["shared"] < 1
    assert problems.overlaps(rows[:1], {}) == {}


def test_a_training_set_is_written(tmp_path, monkeypatch, capsys):
    rates = ["0/8", "1/8", "4/8", "7/8", 0.5, "2/8"]
    polaris = lines(tmp_path / "polaris.jsonl", [
        {"problem": f"{i}: " + " ".join(str(i) * j for j in range(1, 12)), "answer": f"{i}",
         "difficulty": rate} for i, rate in enumerate(rates)])
    bench = lines(tmp_path / "bench.jsonl", [read(polaris)[4] | {"id": "b"}])
    output = tmp_path / "data" / "train.jsonl"
    write(monkeypatch, "polaris", output, "--from", polaris, "--pass-rate", 0.1, 0.9,
          "--without", "aime24", "math500", "--local", f"aime24={bench}", f"math500={bench}")
    rows = rollouts.read_prompts(output)
    assert [row["id"] for row in rows] == [f"polaris-{i}" for i in (1, 2, 3, 5)]
    assert rows[1]["pass_rate"] == 0.5 and rows[1]["answer"] == "2"
    assert read(output.with_name("train.overlaps.jsonl")) == [
        {"id": "polaris-4", "set": "aime24", "other": "b", "kind": "same", "shared": 1.0}]
    assert problems.rows(problems.entry("polaris"), output) == [  # what is written reads back
        {name: row[name] for name in ("id", "problem", "answer", "pass_rate")} for row in rows]
    said = capsys.readouterr().out
    for line in ("polaris: 6 problems (held by POLARIS", "known to have 53291",
                 "1 with a pass rate outside [0.1, 0.9]", "1 the same as one of aime24, 0 near",
                 "0 the same as one of math500", "train.jsonl: 4 prompts"):
        assert line in said


def test_a_benchmark_is_written_whole(tmp_path, monkeypatch):
    file, output = lines(tmp_path / "a.jsonl", MATH + MATH), tmp_path / "{x}.jsonl"
    write(monkeypatch, "aime24", output, "--from", file)
    assert len(rollouts.read_prompts(output)) == 6 and not list(tmp_path.glob("*overlaps*"))
    write(monkeypatch, "aime24", output, "--from", file, "--without")
    assert len(rollouts.read_prompts(output)) == 3


def test_what_cannot_be_written(tmp_path, monkeypatch):
    file, output = lines(tmp_path / "a.jsonl", MATH), tmp_path / "out.jsonl"
    for arguments, says in (
            (["--pass-rate", 0, 1], "aime24: 3 problems have no pass rate, aime24-0"),
            (["--local", f"aime25={file}"], "aime25: not one of the sets after --without"),
            (["--without", "aime25", "--local", f"aime25={file}"], "no problem is left"),
            (["--without", "none"], "there is no problem set 'none'")):
        with pytest.raises(ValueError, match=says):
            write(monkeypatch, "aime24", output, "--from", file, *arguments)
    assert not output.exists()
    for rate in ("9/8", "x", "1/0", [], True, -1, float("nan")):
        lines(file, [MATH[0] | {"difficulty": rate}])
        with pytest.raises(ValueError, match='line 1: the pass rate must be in'):
            write(monkeypatch, "polaris", output, "--from", file)


def test_malformed_rows_can_be_left_out(tmp_path, monkeypatch, capsys):
    file = lines(tmp_path / "a.jsonl", [MATH[0], {"problem": "p", "answer": ""}, MATH[1]])
    write(monkeypatch, "aime24", tmp_path / "out.jsonl", "--from", file, "--skip-broken")
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["aime24-0", "aime24-2"]
    assert "1 malformed left out; the first: " in capsys.readouterr().out


def test_errors_of_the_command_are_one_line(tmp_path):
    import subprocess

    done = subprocess.run([sys.executable, ROOT / "problems.py", "write", "aime2024", "x.jsonl"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "did you mean aime24?" in done.stderr and "Traceback" not in done.stderr
