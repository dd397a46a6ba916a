"""sharpen.py: logits over a temperature, for norms of both kinds."""

import pytest
import torch
from conftest import write_hybrid, write_policy

import model as models
import options
import sharpen


@pytest.mark.parametrize("write", [write_policy, write_hybrid])
def test_logits_are_divided(tmp_path, run, write):
    policy = write(tmp_path / "policy")
    run(sharpen, f"policy={policy}", f"output={tmp_path}/out", "temperatures=[0.7, 0.35]")
    tokens, cu = torch.randint(1, 20, (9,)), torch.tensor([0, 4, 9])

    def logits(path):
        model = models.load(path, dtype=torch.float32)
        with torch.no_grad():
            return model(tokens, cu) @ model.head.T

    base = logits(policy)
    assert [step for step, _ in models.checkpoints(tmp_path / "out")] == [35, 70]
    for tau in (0.7, 0.35):
        torch.testing.assert_close(logits(tmp_path / f"out/step_{round(100 * tau):06d}"),
                                   base / tau, rtol=1e-4, atol=1e-4)


def test_another_policy_or_temperature_is_refused(tmp_path, run):
    """What is in the folder would pass for this policy's."""
    for i in range(2):
        write_policy(tmp_path / f"p{i}", seed=i)
    run(sharpen, f"policy={tmp_path}/p0", f"output={tmp_path}/out", "temperatures=[0.7]")
    for changes in ([f"policy={tmp_path}/p1", "temperatures=[0.7]"],
                    [f"policy={tmp_path}/p0", "temperatures=[0.7, 0.6]"]):
        with pytest.raises(ValueError, match="choose another output"):
            run(sharpen, f"output={tmp_path}/out", *changes)
    run(sharpen, f"policy={tmp_path}/p0", f"output={tmp_path}/out", "temperatures=[0.7]")


@pytest.mark.parametrize("tau", [0.0, -1.0, 0.123, float("nan")])
def test_bad_temperatures(tau):
    with pytest.raises(ValueError, match="temperatures"):
        options.read_config(sharpen.Config, None, ["policy=x", "output=y",
                                                   f"temperatures=[{tau}]"])
