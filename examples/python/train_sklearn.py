#!/usr/bin/env python3
"""A trainyard task that trains scikit-learn's MLPClassifier on handwritten digits.

Trainyard needs only the lines marked `# trainyard`; the rest is an ordinary script.
It needs `pip install scikit-learn`. To try it:

    echo '{"epochs": 5}' | python3 examples/python/train_sklearn.py

The request is a JSON object; `epochs` (20), `hidden` (48) and `seed` (1) are
optional. Checkpoints go to CHECKPOINT_DIR, or to the current directory. SIGTERM ends
the script at once: the next attempt resumes from the last complete epoch.
"""

import json
import os
import pickle
import sys
from pathlib import Path

try:
    import numpy as np
    from sklearn.metrics import log_loss
    from sklearn.neural_network import MLPClassifier
except ImportError as error:
    print(f"this needs scikit-learn (pip install scikit-learn): {error}", file=sys.stderr)
    sys.exit(78)  # trainyard: wrong installation, not retried

DIGITS = Path(__file__).resolve().parent.parent / "data" / "digits.csv.gz"


def tell(**fields: object) -> None:  # trainyard
    print("@trainyard " + json.dumps(fields), flush=True)  # trainyard


def save(model: MLPClassifier, epochs: int, path: Path) -> None:
    """Replaces the file atomically, so that a reader finds a complete one."""
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "wb") as file:
        pickle.dump((model, epochs), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def integer(request: dict, key: str, default: int, least: int, greatest: int) -> int:
    value = request.get(key, default)
    if type(value) is not int or not least <= value <= greatest:
        raise ValueError(f"`{key}` must be an integer from {least} to {greatest}")
    return value


def main() -> None:
    try:
        request = json.load(sys.stdin)  # trainyard
        epochs = integer(request, "epochs", 20, 1, 10_000)
        hidden = integer(request, "hidden", 48, 1, 4096)
        seed = integer(request, "seed", 1, 0, 2**32 - 1)
    except (ValueError, AttributeError) as error:
        print(f"bad request: {error}", file=sys.stderr)
        sys.exit(65)  # trainyard: invalid request, not retried

    table = np.loadtxt(DIGITS, delimiter=",", skiprows=1)
    pixels, digits = table[:, :-1] / 16, table[:, -1].astype(int)
    test = np.arange(len(table)) % 5 == 4

    path = Path(os.environ.get("CHECKPOINT_DIR", ".")).absolute()
    path /= os.environ.get("TRAINYARD_JOB_ID", "by-hand") + ".pickle"  # trainyard
    last = os.environ.get("TRAINYARD_CHECKPOINT")  # trainyard
    model, done = MLPClassifier([hidden], learning_rate_init=0.005, random_state=seed), 0
    if last and os.path.exists(last):
        # A pickle can run code, so the directory must be trusted.
        with open(last, "rb") as file:
            model, done = pickle.load(file)

    for epoch in range(done + 1, epochs + 1):
        model.partial_fit(pixels[~test], digits[~test], classes=range(10))
        save(model, epoch, path)
        tell(checkpoint=str(path))  # trainyard
        loss = log_loss(digits[test], model.predict_proba(pixels[test]))
        tell(progress=epoch / epochs, step=epoch, metrics={"loss": loss})  # trainyard
    tell(result={"accuracy": model.score(pixels[test], digits[test])})  # trainyard


if __name__ == "__main__":
    main()
