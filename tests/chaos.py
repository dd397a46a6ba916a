"""chaos.py - kill runs at random and look whether anything is lost.

One small run of everything (erpd.py: sampling, scoring, stage 1, selection, stage 2, evaluation, on
two ranks, checkpoints at almost every step so that many kills hit a save) is first left alone. Then
the same run is killed again and again, at random moments, with SIGKILL or now and then SIGTERM: one
rank, all ranks, torchrun, the driver, or everything. After each kill no process may be left behind,
and what lies under a checkpoint's or a shard's name must be whole; the command is then simply
started again. Every run that gets through must equal the one that was left alone: the same
responses, each once, their log-probs to 1e-5, the same bits of every checkpoint, the same report.

    python tests/chaos.py --kills 50        (make chaos)
    python tests/chaos.py --kills 3         (in the tests)
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import write_policy  # noqa: E402

import model as models  # noqa: E402
import rollouts  # noqa: E402

MARK = "ERPD_CHAOS"  # in the environment of every process of a run
QUICK = "[train]\nprompts_per_step = 4\nlr = 1e-3\nmax_tokens = 128\ncheckpoint_every = 6\n"
CONFIGS = {
    "erpd.toml": """
policy = "FOLDER/policy"
prompts = "FOLDER/prompts.jsonl"
validation = "FOLDER/few.jsonl"
test = "FOLDER/few.jsonl"
sample = "FOLDER/sample.toml"
evaluate = "FOLDER/evaluate.toml"
processes = 2
[[stage1]]
name = "teacher"
config = "FOLDER/stage1.toml"
[[stage2]]
name = "student"
config = "FOLDER/stage2.toml"
numerator = "teacher"
denominator = "evolving"
""",
    "sample.toml": """
policy = ""
prompts = ""
output = ""
n = 24
max_new_tokens = 60
slots = 2
prompts_per_shard = 2
lenient = true
""",
    "stage1.toml": """
policy = ""
batch = ""
output = ""
steps = 60
[loss]
name = "sapo"
""" + QUICK,
    "stage2.toml": """
batch = ""
output = ""
[[signal]]
numerator = "old"
steps = 40
""" + QUICK,
    "evaluate.toml": """
base = ""
prompts = ""
output = ""
max_new_tokens = 30
pass_at = [1]
lenient = true
plot = false
[[sampling]]
name = "T=1"
n = 2
""",
}


def prepare(folder, work=1.0):
    """`work`: how much there is to do in a run, to be killed in the middle of."""
    write_policy(folder / "policy")
    lines = [json.dumps({"id": str(i), "problem": f"{i % 10}+{i // 10}=", "answer": str(i % 10)})
             for i in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "few.jsonl").write_text("\n".join(lines[:4]) + "\n")
    for name, text in CONFIGS.items():
        text = re.sub(r"^(n|steps) = (\d+)$", lambda m: f"{m[1]} = {max(2, int(int(m[2]) * work))}",
                      text.replace("FOLDER", str(folder)), flags=re.M)
        (folder / name).write_text(text)


def start(folder, output):
    log = open(folder / f"{output}.log", "a")
    return subprocess.Popen(
        [sys.executable, "erpd.py", "--config", str(folder / "erpd.toml"), "--set",
         f"output={folder / output}"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def processes(folder):
    """{pid: driver, torchrun or rank} of a run, by the mark in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or f"{MARK}={folder}\0".encode() not in (
                    entry / "environ").read_bytes() + b"\0":
                continue
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it ended, or is not ours to see
        if state != "Z":
            found[int(entry.name)] = ("driver" if "erpd.py" in " ".join(command[:2]) else
                                      "torchrun" if "torch.distributed.run" in command else "rank")
    return found


def kill(folder, rng):
    """Kill some of a run's processes; returns what was done, None if there was nothing to kill."""
    there = processes(folder)
    kinds = sorted(set(there.values()))
    if not kinds:
        return None
    what = rng.choice([*kinds, "everything", *(["one rank"] * ("rank" in kinds))])
    number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
    victims = [pid for pid, kind in there.items() if what in (kind, "everything")]
    if what == "one rank":
        victims = [rng.choice([pid for pid, kind in there.items() if kind == "rank"])]
    for pid in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return f"{number.name} to {what}"


def wait_until_gone(folder, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process.poll()
        if not processes(folder):
            return
        time.sleep(0.1)
    left = processes(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit(f"still there {seconds} s after the kill: {sorted(left.values())}")


def check_whole(run):
    """What stands under a final name is complete, whenever the kill came."""
    for folder in run.glob("**/step_*"):
        if folder.name.removeprefix("step_").isdigit():
            if folder.parent.name == "state":
                parts = sorted(folder.glob("shard-*.safetensors"))
                assert len(parts) == 2, f"{folder} has {len(parts)} of 2 parts"
            else:
                models.load(folder, dtype=torch.float32)
    for file in run.glob("**/batch/shard-*.safetensors"):
        rollouts.read_header(file)
    for file in (*run.glob("**/*.json"), *run.glob("**/report.json")):
        json.loads(file.read_text())


def compare(run, reference):
    """A run that was killed and went on, against the one that was left alone."""
    mine, theirs = (rollouts.load(f / "seed_0/round_1/batch") for f in (run, reference))
    for name in ("tokens", "cu_seqlens", "prompt", "prompt_length", "finished", "reward"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), f"{run}: {name} differ"
    gap = (mine.sampler_logp - theirs.sampler_logp).abs().max()
    assert gap <= 1e-5, f"{run}: log-probs differ by {gap}"
    for name in ("teacher", "student"):
        a, b = (models.checkpoints(f / "seed_0/round_1" / name) for f in (run, reference))
        assert [step for step, _ in a] == [step for step, _ in b], f"{run}: other checkpoints"
        for (_, x), (_, y) in zip(a, b, strict=True):
            assert models.fingerprint(x) == models.fingerprint(y), f"{x} differs from {y}"
        steps = [json.loads(line)["step"] for line in (
            run / "seed_0/round_1" / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), f"{run}: metrics of steps {steps}"
    a, b = (samples(f) for f in (run, reference))
    assert a == b, f"{run}: other samples of an evaluation"
    a, b = (json.loads((f / "report.json").read_text())["rows"] for f in (run, reference))
    keys = ("policy", "step", "accuracy", "kl", "length", "entropy")
    assert [[r[k] for k in keys] for r in a] == [[r[k] for k in keys] for r in b], f"{run}: report"
    left = [p for pattern in ("**/*.tmp", "**/*.old", "**/*.journal") for p in run.glob(pattern)]
    assert not left, f"{run}: left over: {left[:3]}"


def samples(run):
    """The samples that evaluations kept, each once: {folder: {(problem, sample): tokens}}."""
    found = {}
    for part in run.glob("seed_0/samples/*"):
        lines = [json.loads(line) for file in part.glob("rank_*.jsonl")
                 for line in file.read_text().splitlines()]
        cells = {(line["problem"], line["sample"]): line["tokens"] for line in lines}
        assert len(cells) == len(lines), f"{part}: a sample stands twice"
        found[str(part.relative_to(run))] = cells
    assert found, f"{run}: kept no samples"
    return found


def chaos(folder, kills, seed, work=1.0):
    rng, began, done, runs = random.Random(seed), time.monotonic(), 0, 0
    prepare(folder, work)
    status = start(folder, "reference").wait(600)
    assert status == 0, (folder / "reference.log").read_text()[-3000:]
    alone = time.monotonic() - began
    print(f"left alone: {alone:.0f} s", flush=True)
    while done < kills:
        run, runs, before = folder / f"run_{runs}", runs + 1, done
        for attempt in range(1000):
            process = start(folder, run.name)
            try:
                status = process.wait(rng.uniform(1, alone / 3) if done < kills else 600)
            except subprocess.TimeoutExpired:
                text = kill(folder, rng)
                if text:
                    done += 1
                    log = (folder / f"{run.name}.log").read_text()
                    phase = re.findall(r"^\[([^]]+)\] torchrun", log, re.M)[-1:] or ["start"]
                    print(f"{done:3d}  {text:24s} in {phase[0]}", flush=True)
                wait_until_gone(folder, process)
                check_whole(run)
                continue
            if status == 0:
                break
            log = (folder / f"{run.name}.log").read_text()
            raise SystemExit(f"start {attempt} of {run} ended with status {status}\n{log[-3000:]}")
        compare(run, folder / "reference")
        print(f"     {run.name} got through {done - before} kills and equals the reference",
              flush=True)
        shutil.rmtree(run)
    print(f"{done} kills in {runs} runs, nothing lost: {time.monotonic() - began:.0f} s (seed "
          f"{seed})")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        chaos(Path(folder), args.kills, args.seed)


if __name__ == "__main__":
    main()
