"""Your own loop, surviving crashes: of the server at once, of the script when it starts again.

The first attempt stops in the middle, as a crash would.
"""

import tinkex
from tinkex import types

STEPS = 12
TEXTS = ["one two three four", "two three four five", "three four five six"]


def train(stop_at: int | None = None) -> None:
    with tinkex.ServiceClient() as service:
        found = tinkex.recover(service, "run")
        if found is None:
            training, start = service.create_lora_training_client("tiny", rank=8, seed=0), 0
        else:
            training, start = found.training, found.step
            print(f"resuming after step {start}")
        with tinkex.keep_alive(training, every=4, run="run", step=start) as alive:
            for step in range(start, STEPS):
                if step == stop_at:
                    raise RuntimeError("the power went out")
                tokens = alive.encode(TEXTS[step % len(TEXTS)])
                datum = types.Datum(
                    types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]}
                )
                done = alive.forward_backward([datum], "cross_entropy")
                alive.optim_step(types.AdamParams(learning_rate=5e-3)).result()
                print(f"step {step + 1}: loss {done.result().metrics['loss:sum']:.3f}")


try:
    train(stop_at=7)
except RuntimeError as exc:
    print(f"crashed: {exc}")
train()
