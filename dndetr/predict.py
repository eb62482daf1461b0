"""``python -m dndetr.predict RUN_OR_CHECKPOINT SOURCE``: what a trained detector finds, drawn and as JSON."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from PIL import Image

from . import _process  # noqa: F401
from .commandline import DeviceName, ModelPath, PresetName, program
from .data.image import is_image_name
from .demands import demand

if TYPE_CHECKING:
    from .detector import Detector, Prediction
    from .runs.results import ResultsFolder

VIDEOS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
_KEPT = {".png", ".jpg", ".jpeg"}  # pictures of these keep their file's name
_AT_ONCE = 16  # images or frames handed to the detector together, so that memory does not grow with their number


@dataclass(frozen=True)
class Arguments:
    """One set of predictions."""

    model: ModelPath
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER_OR_VIDEO")]
    """An image, a folder of images, or a video."""
    output: Path | None = None
    """New folder for pictures and predictions.json (default: a numbered one under runs/)."""
    threshold: float = 0.5
    """Score from which a detection is reported."""
    preset: PresetName = None
    device: DeviceName = "auto"
    batch_size: int | None = None
    """Images at once (default: as in the run's evaluation)."""
    skip_unreadable: bool = False
    """Name the images that cannot be decoded, and go on with the others, instead of stopping."""


def run(arguments: Arguments) -> Path:
    """Predict as the arguments say -> the folder with the results."""
    demand(0 <= arguments.threshold <= 1, "threshold", arguments.threshold, "a score from 0 to 1")
    demand(arguments.batch_size is None or arguments.batch_size >= 1, "batch-size", arguments.batch_size, "1 or more")
    files = [] if is_video(arguments.source) else image_files(arguments.source)
    if not files:
        import_av()
    # Imported here so that --help and mistakes in the arguments answer at once.
    from .detector import load
    from .files import write_json_atomic
    from .runs.results import results_folder

    detector = load(arguments.model, arguments.device, preset=arguments.preset)
    with results_folder(arguments.output, "predictions") as results:
        if files:
            entries = {"images": list(predict_images(detector, files, results, arguments))}
        else:
            entries = {"video": arguments.source.name, "frames": list(predict_video(detector, results, arguments))}
        with results.file("predictions.json") as path:
            write_json_atomic(path, {"classes": detector.named_classes, **entries})
    rows = next(iter(reversed(entries.values())))
    found = sum(len(row["detections"]) for row in rows)
    print(f"{found} objects in {len(rows)} {'images' if files else 'frames'}: {results.path}")
    return results.path


def is_video(path: Path) -> bool:
    """Whether the file's name says that it is a video."""
    return path.suffix.lower() in VIDEOS and not path.is_dir()


def image_files(source: Path) -> list[Path]:
    """The file itself, or a folder's files whose names say that they are images, in order of their names."""
    if not source.is_file() and not source.is_dir():
        raise FileNotFoundError(f"{source}: no such image, folder or video")
    if source.is_file():
        return [source]
    files = sorted(file for file in source.iterdir() if _is_image(file))
    if not files:
        raise FileNotFoundError(f"{source}: no images in this folder (folders inside it are not looked into)")
    return files


def _is_image(path: Path) -> bool:
    return is_image_name(path.name) and not is_video(path) and path.is_file()


def picture_names(files: list[Path]) -> list[str]:
    """The names of the files' pictures: as PNG and JPEG files have them, others end in .png, numbered where taken."""
    taken = {file.name for file in files if file.suffix.lower() in _KEPT}
    names = []
    for file in files:
        name = file.name
        if file.suffix.lower() not in _KEPT:
            name, number = f"{file.name}.png", 1
            while name in taken:
                number += 1
                name = f"{file.name}-{number}.png"
            taken.add(name)
        names.append(name)
    return names


def predict_images(
    detector: "Detector", files: list[Path], results: "ResultsFolder", arguments: Arguments
) -> Iterator[dict]:
    """Write each file's picture with its boxes into the results -> an entry for each."""
    from .pictures import draw_boxes

    for some in _portions(read_images(files, arguments.skip_unreadable)):
        pictures = [picture for *_, picture in some]
        found = detector.predict(pictures, arguments.threshold, arguments.batch_size)
        for (file, name, picture), prediction in zip(some, found, strict=True):
            drawn = draw_boxes(picture, prediction.boxes_xyxy, prediction.labels, prediction.scores, detector.names)
            with results.file(name) as path:
                drawn.save(path, quality=92)
            yield {"file": file.name, "width": picture.width, "height": picture.height} | entry(detector, prediction)


def read_images(files: list[Path], skip_unreadable: bool) -> Iterator[tuple[Path, str, Image.Image]]:
    """Each file, the name of its picture, and its pixels; those that cannot be read raise, or are told of and skipped.

    Raises UnreadableImage.
    """
    from .data.errors import UnreadableImage
    from .data.image import read_image

    some_are_read = False
    for place, (file, name) in enumerate(zip(files, picture_names(files), strict=True), 1):
        try:
            picture = read_image(file)
        except UnreadableImage as error:
            if not skip_unreadable or (place == len(files) and not some_are_read):
                raise
            print(f"warning: {error}; skipped", file=sys.stderr)
        else:
            some_are_read = True
            yield file, name, picture


def predict_video(detector: "Detector", results: "ResultsFolder", arguments: Arguments) -> Iterator[dict]:
    """Write the video with its boxes into the results as MP4 -> an entry for each frame."""
    av = import_av()
    from .pictures import draw_boxes

    source, out = arguments.source, None
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such video")
    numbers = count()
    with results.file(f"{source.stem}.mp4") as path:
        try:
            with av.open(str(path), "w") as written:
                for frames in _portions(upright_frames(source)):
                    pictures = [picture for picture, *_ in frames]
                    found = detector.predict(pictures, arguments.threshold, arguments.batch_size)
                    for (picture, seconds, rate), prediction in zip(frames, found, strict=True):
                        boxes, scores, labels, _ = prediction
                        drawn = draw_boxes(picture, boxes, labels, scores, detector.names, scale=1.0)
                        if out is None:
                            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
                            out = written.add_stream(codec, rate=rate)
                            # The codecs want even sides.
                            out.width, out.height, out.pix_fmt = drawn.width // 2 * 2, drawn.height // 2 * 2, "yuv420p"
                        drawn = drawn.crop((0, 0, out.width, out.height))
                        written.mux(out.encode(av.VideoFrame.from_image(drawn)))
                        seconds = None if seconds is None else round(seconds, 4)
                        yield {"frame": next(numbers), "seconds": seconds} | entry(detector, prediction)
                written.mux(out.encode())
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


def upright_frames(source: Path) -> Iterator[tuple[Image.Image, float | None, Fraction]]:
    """Each picture of a video, turned upright as its file says, with its time in seconds, and the frames per second."""
    av = import_av()
    frame = None
    try:
        with av.open(str(source)) as video:
            stream = next(iter(video.streams.video), None)
            if stream is None:
                raise ValueError(f"{source}: there is no picture in this video")
            for frame in video.decode(stream):
                turn = 90 * round(frame.rotation / 90)  # degrees counter-clockwise, for PyAV and Pillow alike
                yield frame.to_image().rotate(turn, expand=True), frame.time, stream.average_rate or Fraction(25)
    except av.FFmpegError as error:
        raise ValueError(f"{source}: cannot be read as a video ({error})") from error
    if frame is None:
        raise ValueError(f"{source}: no frame of this video could be decoded")


def import_av():
    """PyAV, or a ModuleNotFoundError that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise ModuleNotFoundError('videos need PyAV: pip install -e ".[video]"') from error
    return av


def entry(detector: "Detector", prediction: "Prediction") -> dict:
    """The detections of one image in JSON's types; boxes are x0, y0, x1, y1 in pixels of the original."""
    boxes, scores, labels, names = prediction
    rows = zip(boxes.tolist(), labels.tolist(), scores.tolist(), names, strict=True)
    return {
        "detections": [
            {
                "name": name,
                "category_id": detector.classes[label][0],
                "score": round(score, 6),
                "box_xyxy": [round(value, 3) for value in box],
            }
            for box, label, score, name in rows
        ]
    }


def _portions(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while portion := list(islice(items, _AT_ONCE)):
        yield portion


main = program(Arguments, run, "predict", __doc__)


if __name__ == "__main__":
    sys.exit(main())
