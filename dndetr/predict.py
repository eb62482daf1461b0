"""``python -m dndetr.predict RUN_OR_CHECKPOINT SOURCE``: what a trained detector finds, drawn and as JSON."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from PIL import Image

from . import _process  # noqa: F401
from .commandline import exit_status, parse

if TYPE_CHECKING:
    from .detector import Detector, Prediction

VIDEOS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
_AT_ONCE = 16  # images or frames handed to the detector together, so that memory does not grow with their number


@dataclass(frozen=True)
class Arguments:
    """One set of predictions."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run folder (its latest checkpoint) or a checkpoint file."""
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER_OR_VIDEO")]
    """An image, a folder of images, or a video."""
    output: Path | None = None
    """New folder for pictures and predictions.json (default: a numbered one under runs/)."""
    threshold: float = 0.5
    """Score from which a detection is reported."""
    preset: str | None = None
    """The model of a file that has only weights, such as dn-detr-r50 for an official DN-DETR file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int | None = None
    """Images at once (default: as in the run's evaluation)."""


def run(arguments: Arguments) -> Path:
    """Predict as the arguments say -> the folder with the results."""
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold}: give a score from 0 to 1")
    files = [] if is_video(arguments.source) else image_files(arguments.source)
    if not files:
        import_av()
    # Imported here so that --help and mistakes in the arguments answer at once.
    from .checkpoint import write_json_atomic
    from .detector import load
    from .runlog import claim_output, new_run_folder

    detector = load(arguments.model, arguments.device, preset=arguments.preset)
    folder = new_run_folder("predictions") if arguments.output is None else claim_output(arguments.output)
    try:
        if files:
            entries = {"images": list(predict_images(detector, files, folder, arguments))}
        else:
            entries = {"video": arguments.source.name, "frames": list(predict_video(detector, folder, arguments))}
        classes = [{"id": number, "name": name} for number, name in detector.classes]
        write_json_atomic(folder / "predictions.json", {"classes": classes, **entries})
    except BaseException:
        shutil.rmtree(folder)  # it was new or empty, and half a result looks like a whole one
        raise
    rows = next(iter(reversed(entries.values())))
    found = sum(len(row["detections"]) for row in rows)
    print(f"{found} objects in {len(rows)} {'images' if files else 'frames'}: {folder}")
    return folder


def is_video(path: Path) -> bool:
    """Whether the file's name says that it is a video."""
    return path.suffix.lower() in VIDEOS and not path.is_dir()


def image_files(source: Path) -> list[Path]:
    """The file itself, or a folder's files whose names say that they are images, in order of their names."""
    if not source.is_file() and not source.is_dir():
        raise FileNotFoundError(f"{source}: no such image, folder or video")
    if source.is_file():
        return [source]
    Image.init()
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in Image.EXTENSION and file.is_file())
    if not files:
        raise FileNotFoundError(f"{source}: no images in this folder (folders inside it are not looked into)")
    return files


def predict_images(detector: "Detector", files: list[Path], folder: Path, arguments: Arguments) -> Iterator[dict]:
    """Write each file's picture with its boxes into ``folder``, under its own name -> an entry for each."""
    from .data.image import read_image
    from .pictures import draw_boxes

    for some in _portions(files):
        pictures = [read_image(file) for file in some]
        found = detector.predict(pictures, arguments.threshold, arguments.batch_size)
        for file, picture, prediction in zip(some, pictures, found, strict=True):
            drawn = draw_boxes(picture, prediction.boxes_xyxy, prediction.labels, prediction.scores, detector.names)
            keeps = file.suffix.lower() in (".png", ".jpg", ".jpeg")
            drawn.save(folder / (file.name if keeps else f"{file.name}.png"), quality=92)
            yield {"file": file.name, "width": picture.width, "height": picture.height} | entry(detector, prediction)


def predict_video(detector: "Detector", folder: Path, arguments: Arguments) -> Iterator[dict]:
    """Write the video with its boxes into ``folder`` as MP4 -> an entry for each frame."""
    av = import_av()
    from .pictures import draw_boxes

    source = arguments.source
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such video")
    try:
        with av.open(str(source)) as video, av.open(str(folder / f"{source.stem}.mp4"), "w") as written:
            stream = next(iter(video.streams.video), None)
            if stream is None:
                raise ValueError(f"{source}: there is no picture in this video")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            out = written.add_stream(codec, rate=stream.average_rate or 25)
            # The codecs want even sides.
            out.width, out.height, out.pix_fmt = stream.width // 2 * 2, stream.height // 2 * 2, "yuv420p"
            number = 0
            for frames in _portions(video.decode(stream)):
                pictures = [frame.to_image() for frame in frames]
                found = detector.predict(pictures, arguments.threshold, arguments.batch_size)
                for frame, picture, prediction in zip(frames, pictures, found, strict=True):
                    boxes, scores, labels, _ = prediction
                    drawn = draw_boxes(picture, boxes, labels, scores, detector.names, scale=1.0)
                    drawn = drawn.crop((0, 0, out.width, out.height))
                    for packet in out.encode(av.VideoFrame.from_image(drawn)):
                        written.mux(packet)
                    seconds = None if frame.time is None else round(frame.time, 4)
                    yield {"frame": number, "seconds": seconds} | entry(detector, prediction)
                    number += 1
            for packet in out.encode():
                written.mux(packet)
            if number == 0:
                raise ValueError(f"{source}: no frame of this video could be decoded")
    except av.FFmpegError as error:
        raise ValueError(f"{source}: cannot be read as a video ({error})") from error


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


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; exit status 1 and one line on stderr for what the user can mend."""
    return exit_status(lambda: run(parse(Arguments, argv, "python -m dndetr.predict", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
