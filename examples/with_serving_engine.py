"""A serving engine: requests come and go between steps, each at its own step of its own plan, in one kernel a round."""

import torch

from ersde_fast import er_sde_plan, fast_step, portable_noise, stack_plans
from ersde_fast.schedules import karras_sigmas

plans = [er_sde_plan(karras_sigmas(8)), er_sde_plan(karras_sigmas(12), noise_scaler="ode"), er_sde_plan(karras_sigmas(20))]
stack, shape = stack_plans(plans), (4, 32, 32)
waiting = [{"plan": n % 3, "step": 0, "seed": n} for n in range(6)]  # a request is data: it can wait, move and be resumed
for request in waiting:
    request["x"] = plans[request["plan"]].sigmas[0].item() * portable_noise((1, *shape), request["seed"], step=-1)[0]
    request["history"] = [torch.zeros(shape)] * stack.order
running, done, rounds = [], [], 0
while waiting or running:
    running += [waiting.pop(0) for _ in range(min(len(waiting), 2))]  # two more join in every round
    plan, step = (torch.tensor([request[key] for request in running]) for key in ("plan", "step"))
    x = torch.stack([request["x"] for request in running])
    sigma = torch.stack([plans[p].sigmas[s] for p, s in zip(plan, step, strict=True)]).float().view(-1, 1, 1, 1)
    denoised = (0.3 * sigma**2 + 0.25 * x) / (sigma**2 + 0.25)  # instead of the engine's network, on the whole batch
    history = [denoised, *(torch.stack(older) for older in zip(*(request["history"][:-1] for request in running), strict=True))]
    x = fast_step(stack, (plan, step), x, history, seed=[(request["seed"], 0) for request in running])
    for b, request in enumerate(running):
        request.update(x=x[b], history=[prediction[b] for prediction in history], step=request["step"] + 1)
    done += [request for request in running if request["step"] == plans[request["plan"]].num_steps]
    running, rounds = [request for request in running if request["step"] < plans[request["plan"]].num_steps], rounds + 1
print(f"{len(done)} requests of 8, 12 and 20 steps in {rounds} rounds, means {[round(r['x'].mean().item(), 2) for r in done]}")
