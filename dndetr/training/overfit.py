"""``--overfit N``: can the pipeline learn N images by heart? What it cannot learn then, it cannot learn at all."""

from dataclasses import replace

from ..config import Config

PASSED = 0.9  # AP


def overfitting(config: Config, count: int) -> Config:
    """The preset as it learns ``count`` images by heart: no augmentation, an average with a short memory."""
    return replace(
        config,
        epochs=12,
        batch_size=min(config.batch_size, count),
        evaluate_every=4,
        images=replace(config.images, augment=False),
        optimizer=replace(config.optimizer, schedule="cosine", warmup=0.05, ema=min(config.optimizer.ema, 0.98)),
    )


def verdict(ap: float | None, count: int, data: str) -> tuple[bool, str]:
    """Whether the pipeline passed, and a sentence that says so or what to look at."""
    score = "no AP" if ap is None else f"AP {ap:.3f}"
    if ap is not None and ap >= PASSED:
        return True, f"--overfit {count} passed: {score} on the {count} images it was trained on"
    check = "" if data == "shapes" else f"python -m dndetr.check_data {data} --output samples.png, "
    return False, (
        f"--overfit {count} did not pass: {score} on the {count} images it was trained on, {PASSED} wanted; look at "
        f"first_batch.png (are the boxes on their objects?), {check}predictions.png (what is missed?) and curves.png; "
        "if AP was still rising, give more --epochs; if objects are tiny or many, a larger --images.canvas or more "
        "--model.queries; if the loss barely fell, --init FILE or another --lr"
    )
