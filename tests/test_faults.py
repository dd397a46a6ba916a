"""What goes wrong on real machines: killed ranks, SIGTERM, full disks, two runs in one folder, too
little memory, spikes. Nothing is lost, and the message says what to do."""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
import pytest
import torch
from conftest import ROOT, command, same_bits, write_batch

import durable
import model as models
import rollouts
import runtime
import sample
import stage1

QUICK = ["train.prompts_per_step=4", "train.lr=1e-3", "train.max_tokens=64", "loss.name=grpo"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def arguments(policy, batch, output, *more):
    return [f"policy={policy}", f"batch={batch}", f"output={output}", *QUICK, *more]


def launch(*options, settings):
    return subprocess.Popen(
        [*TORCHRUN, *options, str(ROOT / "stage1.py"), "--set", *settings], cwd=ROOT, text=True,
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def steps_done(folder):
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for_step(folder, step, process, seconds=60):
    end = time.monotonic() + seconds
    while steps_done(folder) < step:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def children(pid):
    """Processes that `pid` started."""
    return [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit()
            and (e / "stat").exists()
            and int((e / "stat").read_text().rpartition(")")[2].split()[1]) == pid]


def snapshot(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ---------------------------------------------------------------- killed


def test_three_kills_anywhere(tmp_path):
    """The short form of `make chaos`: three kills of anything at any time lose nothing."""
    chaos.chaos(tmp_path, kills=3, seed=random.SystemRandom().randrange(10**6), work=0.3)


def test_torchrun_restarts_a_killed_rank(run, tmp_path, policy, batch):
    """--max-restarts: the workers that torchrun starts again go on from the last checkpoint."""
    settings = ["steps=12", "train.checkpoint_every=2"]
    process = launch("--max-restarts", "2",
                     settings=arguments(policy, batch, tmp_path / "x", *settings))
    wait_for_step(tmp_path / "x", 5, process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert "resumed from" in text
    result = command("stage1.py", *arguments(policy, batch, tmp_path / "y", *settings), ranks=2)
    assert result.returncode == 0, result.stderr
    assert same_bits(tmp_path / "x/step_000012", tmp_path / "y/step_000012")


def test_sigterm_saves_and_exits(tmp_path, policy, batch):
    """A scheduler's notice: the step that has begun is dropped, the state saved, and the same
    command goes on there, to the same bits."""
    settings = arguments(policy, batch, tmp_path / "x", "steps=40", "train.checkpoint_every=40")
    process = launch(settings=settings)
    wait_for_step(tmp_path / "x", 3, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    text = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 60 and process.returncode != 0
    assert "stopped by SIGTERM after step" in text
    saved = [int(p.name.removeprefix("step_")) for p in (tmp_path / "x/state").iterdir()]
    assert len(saved) == 1 and 3 <= saved[0] < 40
    assert not models.checkpoints(tmp_path / "x")  # no checkpoint that was not asked for
    for output, more in (("x", ["steps=40"]), ("y", ["steps=40"])):
        result = command("stage1.py", *arguments(
            policy, batch, tmp_path / output, "train.checkpoint_every=40", *more), ranks=2)
        assert result.returncode == 0, result.stderr
        assert (f"steps {saved[0] + 1} to 40" in result.stdout) == (output == "x")
    assert same_bits(tmp_path / "x/step_000040", tmp_path / "y/step_000040")


def test_sigterm_of_one_rank_stops_all(tmp_path, policy, batch):
    """The others must not wait in a collective for a rank that has left."""
    process = launch(settings=arguments(policy, batch, tmp_path / "x", "steps=4000",
                                        "train.checkpoint_every=4000"))
    wait_for_step(tmp_path / "x", 3, process)
    os.kill(min(children(process.pid)), signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM after step" in text and list((tmp_path / "x/state").iterdir())


def test_workers_end_with_torchrun(tmp_path, policy, batch):
    """A torchrun that was killed must leave nobody behind to write into the folder."""
    process = launch(settings=arguments(policy, batch, tmp_path / "x", "steps=4000"))
    wait_for_step(tmp_path / "x", 3, process)
    workers = children(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_finished_response_is_never_sampled_again(run, tmp_path, policy, monkeypatch):
    """A sampler that dies in the middle of a shard: its finished responses are in the journal."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(
        json.dumps({"id": i, "problem": f"{i}+1=", "answer": "1"}) + "\n" for i in range(6)))
    settings = [f"policy={policy}", f"prompts={prompts}", "n=4", "max_new_tokens=20", "slots=5",
                "prompts_per_shard=3", "lenient=true"]
    run(sample, *settings, f"output={tmp_path / 'whole'}")
    stream, seen = sample.stream, []

    def dies(*args, **options):
        for i, item in enumerate(stream(*args, **options)):
            if i == 7:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(sample, "stream", dies)
    with pytest.raises(KeyboardInterrupt):
        run(sample, *settings, f"output={tmp_path / 'x'}")
    journals = sorted((tmp_path / "x").glob("*.journal"))
    lines = [line for file in journals for line in file.read_text().splitlines()]
    assert len(lines) == 7
    with open(journals[-1], "a") as file:
        file.write(lines[0][:11])  # killed in the middle of a line

    def watches(*args, **options):
        for item in stream(*args, **options):
            seen.append((item[0].prompt, item[1]))
            yield item

    monkeypatch.setattr(sample, "stream", watches)
    run(sample, *settings, f"output={tmp_path / 'x'}")
    assert len(seen) == len(set(seen)) == 24 - 7 and not list((tmp_path / "x").glob("*.journal"))
    got, want = rollouts.load(tmp_path / "x"), rollouts.load(tmp_path / "whole")
    for name in ("tokens", "cu_seqlens", "prompt", "finished", "reward"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.allclose(got.sampler_logp, want.sampler_logp, atol=1e-5)


def test_another_runs_journal_is_not_ours(tmp_path):
    header, bounds = {"seed": 1}, ([3], 1, 9, 9)
    journal = rollouts.Journal(tmp_path, 0, header, *bounds)
    journal.add(3, 0, [1, 2], [-0.5, -0.25], True)
    again = rollouts.Journal(tmp_path, 0, header, *bounds)
    assert again.entries == {(3, 0): ([1, 2], [-0.5, -0.25], True)}
    assert not rollouts.Journal(tmp_path, 0, {"seed": 2}, *bounds).entries


# ---------------------------------------------------------------- disks


def limited(settings, size):
    """stage1.py on a disk that takes no file above `size` bytes."""
    return subprocess.run(
        [sys.executable, str(ROOT / "stage1.py"), "--set", *settings], cwd=ROOT, text=True,
        capture_output=True, timeout=120, env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_a_full_disk_keeps_the_last_checkpoint(run, tmp_path, policy):
    """One clear line, nothing half-written, what was there untouched; with room again it goes on.
    """
    batch, output = write_batch(tmp_path / "batch", policy), tmp_path / "x"
    run(stage1, *arguments(policy, batch, output, "steps=2"))
    before = {name: snapshot(output / name) for name in ("step_000002", "state")}
    size = max(len(data) for data in before["step_000002"].values())
    result = limited(arguments(policy, batch, output, "steps=4"), size // 2)
    assert result.returncode == 2
    assert "could not be written" in result.stderr and "step_000004" in result.stderr
    assert len(result.stderr.splitlines()) == 2 and "Traceback" not in result.stderr
    assert {name: snapshot(output / name) for name in before} == before
    assert not (output / "step_000004").exists() and not list(output.rglob("*.tmp"))
    run(stage1, *arguments(policy, batch, output, "steps=4"))
    run(stage1, *arguments(policy, batch, tmp_path / "y", "steps=4"))
    assert same_bits(output / "step_000004", tmp_path / "y/step_000004")


def test_a_folder_that_cannot_be_written(tmp_path, policy, batch):
    (tmp_path / "file").write_text("")
    result = command("stage1.py", *arguments(policy, batch, tmp_path / "file" / "x"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: " in result.stderr and str(tmp_path / "file") in result.stderr


@pytest.mark.parametrize("fails", ["filling", "publishing"])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch, fails):
    with durable.folder(tmp_path / "a") as aside:
        (aside / "x").write_text("1")
    with pytest.raises(OSError, match="no"), durable.folder(tmp_path / "a") as aside:
        (aside / "x").write_text("2")
        if fails == "filling":
            raise OSError("no")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no")))
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/x").read_text() == "1"


def test_tensors_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        durable.write_tensors(tmp_path / "file" / "t.safetensors", {"x": torch.ones(1)})
    durable.write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(1)})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "t.safetensors"]


# ---------------------------------------------------------------- two at once, hangs


def test_two_runs_in_one_folder_are_refused(run, tmp_path, policy, batch, monkeypatch):
    """Two would interleave their metrics and remove each other's states."""
    monkeypatch.setattr(runtime, "LOCK_SECONDS", 0)
    (tmp_path / "x").mkdir()
    with open(tmp_path / "x/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing here"):
            run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=1"))
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=1"))


def test_a_rank_without_work_hangs_nobody(tmp_path, policy):
    """One sequence a step for two ranks: one of them has an empty micro-batch every time."""
    batch = write_batch(tmp_path / "batch", policy, prompts=3, n=1)
    process = launch(settings=arguments(policy, batch, tmp_path / "x", "steps=3",
                                        "train.prompts_per_step=1"))
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()


# ---------------------------------------------------------------- numbers, memory


def test_a_spike_is_reported_and_can_be_skipped(run, tmp_path, policy, batch, capsys):
    """From the fifth step on there is a median to compare with; here everything counts as a spike.
    """
    for name, more in (("said", []), ("skipped", ["train.skip_spikes=true"])):
        run(stage1, *arguments(policy, batch, tmp_path / name, "steps=6", "train.spike=1e-9",
                               "train.checkpoint_at=[4]", *more))
        assert "times the usual" in capsys.readouterr().out
    assert same_bits(tmp_path / "said/step_000004", tmp_path / "skipped/step_000004")
    assert not same_bits(tmp_path / "said/step_000004", tmp_path / "said/step_000006")
    assert same_bits(tmp_path / "skipped/step_000004", tmp_path / "skipped/step_000006")


def test_gradients_that_are_mostly_zero_are_no_reason_to_stop(run, tmp_path, policy):
    """Groups of equal rewards teach GRPO nothing; the one that does is no spike."""
    reward = [0.0] * 28 + [0.0, 1.0, 0.0, 1.0]
    batch = write_batch(tmp_path / "batch", policy, reward=reward)
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=16", "loss.name=grpo",
                           "train.prompts_per_step=1"))
    norms = [json.loads(line)["grad_norm"] for line in open(tmp_path / "x/metrics.jsonl")]
    assert len(norms) == 16 and sum(x == 0 for x in norms) == 14 and max(norms) > 0


def test_the_usual_norm_is_known_after_a_resume(run, tmp_path, policy, batch):
    """The guard's memory is metrics.jsonl: a resumed run decides as an uninterrupted one."""
    guard = ["train.spike=1.2", "train.skip_spikes=true", "train.checkpoint_every=6"]
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=6", *guard))
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=12", *guard))
    run(stage1, *arguments(policy, batch, tmp_path / "y", "steps=12", *guard))
    assert same_bits(tmp_path / "x/step_000012", tmp_path / "y/step_000012")


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "train.max_tokens"),
    (MemoryError(), "train.max_tokens"),
    (OSError(28, "No space left on device", "x/y"), "No space left on device: 'x/y'"),
    (ValueError("bad key"), "error: bad key"),
    (RuntimeError("[gloo/pair.cc] Connection closed by peer"), "another rank is gone")])
def test_trouble_is_one_line(monkeypatch, capsys, error, words):
    def main():
        raise error

    class Left(Exception):
        pass

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="2"):
        runtime.command(main)
    text = capsys.readouterr().err
    assert words in text and "Traceback" not in text and len(text.splitlines()) == 2


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        runtime.command(lambda: torch.ones(2) @ torch.ones(3))


def test_old_logp_of_another_policy_is_noticed():
    with pytest.raises(ValueError, match="not reproducible"):
        runtime.require_reproducible(torch.zeros(4), torch.full((4,), 0.1))
    mean, most = runtime.require_reproducible(torch.zeros(4), torch.tensor([0, 0, 0, 1e-3]))
    assert 0 < mean < most == pytest.approx(1e-3)


def test_a_stale_half_written_folder_is_no_checkpoint(run, tmp_path, policy, batch):
    """step_000002.tmp and .old of a killed writer are never read, and do not stop a restart."""
    output = tmp_path / "x"
    run(stage1, *arguments(policy, batch, output, "steps=2"))
    for name in ("step_000004.tmp", "step_000004.old", "state/step_000004.tmp"):
        shutil.copytree(output / "step_000002", output / name)
    assert [step for step, _ in models.checkpoints(output)] == [2]
    run(stage1, *arguments(policy, batch, output, "steps=4"))
    assert sorted(p.name for p in output.rglob("step_*")) == [
        "step_000002", "step_000004", "step_000004"]
