"""The examples run as they stand, and are short enough to read."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import calibrate_digits
import demo
import reward
from ersde_fast import Plan, er_sde_plan
from samplers import k_diffusion

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PRINTED = {
    "with_diffusers.py": r"2 images of 32x32 in 12 evaluations",
    "with_k_diffusion.py": r"mean 0\.(29|30|31)\d, standard deviation 0\.(49|50)\d",
    "with_er_sde_solver.py": r"mean 0\.(29|30|31)\d, standard deviation 0\.(48|49|50)\d",
    "with_edm.py": r"16 images in digits/",
    "with_serving_engine.py": r"6 requests of 8, 12 and 20 steps in 22 rounds, means \[(0\.\d+, ){5}0\.\d+\]",
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("with_*.py")))
def test_example(name, tmp_path, monkeypatch, capsys):
    if name == "with_k_diffusion.py":
        k_diffusion()  # importable without torchvision
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)


def test_the_gradient_of_the_density_raises_the_reward():
    """On a seed that training does not draw: 1.6 times as measured, and 0.25 times with the density's sign turned."""
    net, labels = reward.load_digits_unet(), torch.eye(10)[[3, 8]].repeat_interleave(8, dim=0)
    before = reward.thickness(reward.rollout(net, labels, seed=0)[-1]).mean()
    assert len(list(reward.train(net, [3, 8], samples=6, iterations=3, learning_rate=5e-4))) == 3
    after = reward.thickness(reward.rollout(net, labels, seed=0)[-1]).mean()
    assert after > 1.2 * before > 0


class NormalData:
    """The interface of the demo's network, exact for normal data of standard deviation 0.3."""

    label_dim, sigma_data = 2, 0.6

    def edm_output(self, x, sigma, labels):
        variance = sigma**2 + self.sigma_data**2
        denoised = x * 0.3**2 / (0.3**2 + sigma**2)
        return (denoised - self.sigma_data**2 / variance * x) * variance**0.5 / (sigma * self.sigma_data)


def test_the_demo_tells_how_far_each_sampler_ends_from_the_limit():
    rows, distances = demo.beside(NormalData(), seed=3)
    assert [tuple(row.shape) for row in rows] == [(2, 1, 28, 28)] * 4
    assert (rows[-1].std() - 0.3).abs() < 0.02
    assert 0 < distances["ersde-fast"] < distances["ComfyUI's er_sde"] < distances["DDIM"]
    assert demo.image(rows).size == (2 * 28 * 3, 4 * 28 * 3)


def test_the_calibrated_plan_of_the_digits():
    """The file beside the network is what `calibrate_digits.py` makes; that takes minutes, so here it is only read."""
    plan = Plan.load(calibrate_digits.FILE)
    assert plan.report.calibrated and plan.num_steps == 5 and plan.sigmas[0] == 80
    assert plan.sigma_data == reward.load_digits_unet().sigma_data
    analytic = er_sde_plan(plan.sigmas, noise_scaler="sde_5", guidance=1.0)
    torch.testing.assert_close(plan.weights[:, [0, -1]], analytic.weights[:, [0, -1]], rtol=1e-12, atol=0)
