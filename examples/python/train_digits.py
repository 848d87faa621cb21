#!/usr/bin/env python3
"""A trainyard task that trains a small neural network on handwritten digits.

It needs only Python 3.9 or newer. To try it:
    echo '{"epochs": 5}' | python3 examples/python/train_digits.py

The request is a JSON object on stdin. All fields are optional. `name` is ignored,
and unknown fields are refused:

    epochs             passes over the training rows            1 to 10000   (40)
    hidden             units of the hidden layer                1 to 512     (48)
    learning_rate      Adam's step size                         up to 1      (0.002)
    batch              rows per update                          1 to 1024    (16)
    seed               for the initial weights and row order    from 0       (1)
    seconds_per_epoch  minimum duration of an epoch             0 to 3600    (0)
    data               the gzipped CSV file                     (the digits of examples/data)

Every fifth row is held out to measure `accuracy`. With the same Python, a request
always gives the same network, even if the training is interrupted.

Checkpoints go to CHECKPOINT_DIR, TRAINYARD_WORK_DIR or a new temporary directory:
one after each epoch and one at a stop. Each replaces the previous one; the last one
is the trained network. The training resumes from TRAINYARD_CHECKPOINT, if that is
set and valid. Exit codes: 0 done, 65 invalid request or data, 66 unreadable data, 75
stopped by SIGTERM or Ctrl-C, with a checkpoint.
"""

import gzip
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field
from operator import mul
from pathlib import Path
from typing import Any

DIGITS = Path(__file__).resolve().parent.parent / "data" / "digits.csv.gz"
PIXELS, CLASSES, TEST_EVERY = 64, 10, 5

Example = tuple[list[float], int]  # the pixels followed by a 1.0, and the digit
Layer = list[list[float]]  # a row of weights per unit; the last one is the bias


class BadRequest(Exception):
    """This request can never succeed."""


@dataclass(frozen=True)
class Settings:
    epochs: int = 40
    hidden: int = 48
    learning_rate: float = 0.002
    batch: int = 16
    seed: int = 1
    seconds_per_epoch: float = 0.0
    data: str = str(DIGITS)

    def shaping(self) -> dict[str, float]:
        """The settings that a checkpoint and its request must share."""
        return {key: getattr(self, key) for key in ("hidden", "learning_rate", "batch", "seed")}


LIMITS = {
    "epochs": (1, 10_000),
    "hidden": (1, 512),
    "learning_rate": (1e-9, 1.0),
    "batch": (1, 1024),
    "seed": (0, 2**63 - 1),
    "seconds_per_epoch": (0.0, 3600.0),
}


def parse_settings(raw: bytes) -> Settings:
    try:
        payload = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"stdin is not JSON: {error}") from error
    if not isinstance(payload, dict):
        raise BadRequest("the request is not a JSON object")
    payload.pop("name", None)
    if not isinstance(payload.get("data", ""), str):
        raise BadRequest("`data` must be a string")
    for key in sorted(payload.keys() - {"data"}):
        check_number(key, payload[key])
    return Settings(**payload)


def check_number(key: str, value: Any) -> None:
    if key not in LIMITS:
        raise BadRequest(f"unknown field `{key}`")
    least, greatest = LIMITS[key]
    kind = "a number" if isinstance(least, float) else "an integer"
    # By type, since True is an instance of int.
    if type(value) not in (int, type(least)) or not least <= value <= greatest:
        raise BadRequest(f"`{key}` must be {kind} from {least} to {greatest}")


def load_digits(path: str) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the held-out ones."""
    try:
        with gzip.open(path, "rt") as lines:
            examples = [parse_row(line) for line in list(lines)[1:]]
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadRequest(f"{path!r} does not hold the digits: {error}") from error
    test = examples[TEST_EVERY - 1 :: TEST_EVERY]
    if not test:
        raise BadRequest(f"{path!r} has too few rows")
    return [example for row, example in enumerate(examples, 1) if row % TEST_EVERY], test


def parse_row(line: str) -> Example:
    *pixels, digit = map(int, line.split(","))
    if len(pixels) != PIXELS or max(pixels) > 16 or not 0 <= digit < CLASSES:
        raise ValueError(f"not {PIXELS} pixels up to 16 and a digit: {line[:80]!r}")
    return [pixel / 16 for pixel in pixels] + [1.0], digit


@dataclass
class State:
    """The state of the training. A checkpoint is this and the settings."""

    layers: list[Layer]
    means: list[Layer]  # of each weight's gradient: Adam's first moment
    squares: list[Layer]  # and its second
    updates: int = 0
    epoch: int = 0  # how many are complete
    position: int = 0  # rows done in the current one
    loss: float = 0.0  # summed over those rows
    losses: list[float] = field(default_factory=list)  # the mean, of each complete epoch


def new_state(settings: Settings) -> State:
    normal = random.Random(settings.seed).gauss
    layers = [
        [[normal(0, math.sqrt(2 / inputs)) for _ in range(inputs)] + [0.0] for _ in range(units)]
        for inputs, units in [(PIXELS, settings.hidden), (settings.hidden, CLASSES)]
    ]
    return State(layers, means=zeros_like(layers), squares=zeros_like(layers))


def zeros_like(layers: list[Layer]) -> list[Layer]:
    return [[[0.0] * len(row) for row in layer] for layer in layers]


def forward(layers: list[Layer], pixels: list[float]) -> tuple[list[float], list[float]]:
    """The hidden layer's output, followed by a 1.0, and a score per digit."""
    hidden = [max(0.0, sum(map(mul, row, pixels))) for row in layers[0]] + [1.0]
    return hidden, [sum(map(mul, row, hidden)) for row in layers[1]]


def add_gradient(layers: list[Layer], gradient: list[Layer], example: Example) -> float:
    """Adds one example's gradient, and returns its loss (cross-entropy)."""
    pixels, digit = example
    hidden, scores = forward(layers, pixels)
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    total = sum(exponentials)
    errors = [exponential / total for exponential in exponentials]
    errors[digit] -= 1.0
    back = [0.0] * len(hidden)
    for error, row in zip(errors, layers[1]):
        back = [b + error * weight for b, weight in zip(back, row)]
    add_outer(gradient[1], errors, hidden)
    add_outer(gradient[0], [b if h > 0 else 0.0 for b, h in zip(back, hidden[:-1])], pixels)
    return math.log(total) + top - scores[digit]


def add_outer(rows: Layer, errors: list[float], inputs: list[float]) -> None:
    for row, error in zip(rows, errors):
        if error:
            row[:] = [sum_so_far + error * value for sum_so_far, value in zip(row, inputs)]


def train_batch(state: State, learning_rate: float, batch: list[Example]) -> None:
    gradient = zeros_like(state.layers)
    for example in batch:
        state.loss += add_gradient(state.layers, gradient, example)
    state.updates += 1
    state.position += len(batch)
    step = learning_rate * math.sqrt(1 - 0.999**state.updates) / (1 - 0.9**state.updates)
    for layers in zip(state.layers, gradient, state.means, state.squares):
        for weights, slopes, means, squares in zip(*layers):
            for i, total in enumerate(slopes):
                slope = total / len(batch)
                means[i] = mean = 0.9 * means[i] + 0.1 * slope
                squares[i] = square = 0.999 * squares[i] + 0.001 * slope * slope
                weights[i] -= step * mean / (math.sqrt(square) + 1e-8)


def accuracy(layers: list[Layer], examples: list[Example]) -> float:
    answers = [(forward(layers, pixels)[1], digit) for pixels, digit in examples]
    return sum(scores.index(max(scores)) == digit for scores, digit in answers) / len(examples)


class Stop:
    requested = False  # whether SIGTERM or Ctrl-C has come

    def request(self, *_: object) -> None:
        self.requested = True

    def sleep_until(self, due: float) -> None:
        while not self.requested and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


def train_epoch(state: State, settings: Settings, examples: list[Example], stop: Stop) -> bool:
    """Trains to the end of the epoch. Returns False if stopped before that."""
    # Depends on seed and epoch only, so a checkpoint needs no generator's state.
    shuffled = random.Random(f"{settings.seed} {state.epoch}").sample(examples, len(examples))
    started, first = time.monotonic(), state.position
    while state.position < len(shuffled):
        if stop.requested:
            return False
        batch = shuffled[state.position : state.position + settings.batch]
        train_batch(state, settings.learning_rate, batch)
        share = (state.position - first) / len(shuffled)
        stop.sleep_until(started + share * settings.seconds_per_epoch)
    state.losses.append(state.loss / len(shuffled))
    state.epoch, state.position, state.loss = state.epoch + 1, 0, 0.0
    return True


def checkpoint_path() -> Path:
    """One file per job, shared by its attempts."""
    directory = os.environ.get("CHECKPOINT_DIR") or os.environ.get("TRAINYARD_WORK_DIR")
    parent = Path(directory or tempfile.mkdtemp(prefix="train-digits-")).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f"{os.environ.get('TRAINYARD_JOB_ID', 'by-hand')}.json"


def save_checkpoint(path: Path, settings: Settings, state: State) -> None:
    """Replaces the file atomically, so that a reader finds a complete one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}")
    with open(partial, "w") as file:
        json.dump({"settings": settings.shaping(), "state": asdict(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name must survive a power failure too
    os.close(directory)


def resume(path: str, settings: Settings) -> State:
    try:
        content = json.loads(Path(path).read_bytes())
        if content["settings"] != settings.shaping():
            raise ValueError("it belongs to a request with other settings")
        state = State(**content["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"starting over, since {path} cannot be used: {error}", file=sys.stderr, flush=True)
        return new_state(settings)
    print(f"going on from {path}, {state.epoch} epochs are done", flush=True)
    return state


def tell(**fields: object) -> None:
    print("@trainyard " + json.dumps(fields), flush=True)  # not left in a buffer


def main() -> int:
    stop = Stop()
    signal.signal(signal.SIGTERM, stop.request)
    signal.signal(signal.SIGINT, stop.request)
    try:
        settings = parse_settings(sys.stdin.buffer.read())
        training, test = load_digits(settings.data)
    except BadRequest as error:
        print(f"bad request: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:  # perhaps a file system is down, so a retry may help
        print(f"cannot read the data: {error}", file=sys.stderr)
        return os.EX_NOINPUT

    path, checkpoint = checkpoint_path(), os.environ.get("TRAINYARD_CHECKPOINT")
    state = resume(checkpoint, settings) if checkpoint else new_state(settings)
    while state.epoch < settings.epochs:
        completed = train_epoch(state, settings, training, stop)
        save_checkpoint(path, settings, state)
        tell(checkpoint=str(path))
        if not completed:
            return os.EX_TEMPFAIL
        metrics = {"loss": state.losses[-1], "accuracy": accuracy(state.layers, test)}
        tell(progress=state.epoch / settings.epochs, step=state.epoch, metrics=metrics)
    metrics = {"loss": state.losses[-1], "accuracy": accuracy(state.layers, test)}
    tell(result={"epochs": state.epoch, **metrics})
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
