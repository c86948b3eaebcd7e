"""Region lines out of published annotations.

python -m train.data.convert coco-instances annotations/instances_train2017.json coco_objects.jsonl
python -m train.data.convert index 'lines/{000..063}.jsonl'      line breaks of lines that are there already
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.data import convert_coco, convert_flickr30k, convert_refcoco, convert_visual_genome
from train.data.braces import expand
from train.data.convert_common import Line, lines_writer, require_file
from train.data.paths import told
from train.data.region_lines import offsets_file, scan_lines
from train.data.sample import DataError, Skipped

_BY_SPLIT = ("refcoco", "flickr30k-entities")


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m train.data.convert",
        description="Writes region lines (train.data.region_lines) out of published annotations.",
        formatter_class=form,
        epilog="examples:\n"
        "  python -m train.data.convert coco-instances instances_train2017.json coco_objects.jsonl --images train2017\n"
        "  python -m train.data.convert visual-genome region_descriptions.json vg_regions.jsonl \\\n"
        "    --image-data image_data.json\n"
        "  python -m train.data.convert visual-genome attributes.json vg_objects.jsonl --image-data image_data.json\n"
        "  python -m train.data.convert refcoco 'refs(unc).p' refcoco_plus/ --instances instances.json\n"
        "  python -m train.data.convert refcoco 'refs(unc).p' refcoco_plus/ --instances instances.json \\\n"
        "    --texts refcoco+_{train,val,test}.json --detections dets.json\n"
        "  python -m train.data.convert flickr30k-entities flickr30k_entities/ entities/ --images flickr30k-images\n",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    coco = kinds.add_parser("coco-instances", help="COCO's objects, called by their class")
    coco.add_argument("annotations", type=Path, help="instances_*.json")
    coco.add_argument("--captions", type=Path, help="captions_*.json of the same images, as captions of the whole")
    genome = kinds.add_parser("visual-genome", help="Visual Genome's regions, or its objects with their attributes")
    genome.add_argument("annotations", type=Path, help="region_descriptions.json, attributes.json or objects.json")
    genome.add_argument("--image-data", type=Path, required=True, help="image_data.json, for sizes and names")
    refcoco = kinds.add_parser("refcoco", help="RefCOCO, RefCOCO+ or RefCOCOg, a file for each split")
    refcoco.add_argument("annotations", type=Path, help="refs(unc).p, or the same as .json")
    refcoco.add_argument("--instances", type=Path, required=True, help="instances.json beside it")
    refcoco.add_argument("--texts", type=Path, nargs="+", default=(), help="lists of image, text and ref_id to take")
    refcoco.add_argument("--detections", type=Path, help="dets.json, boxes to choose among for grounding=detections")
    refcoco.add_argument("--as-captions", action="store_true", help="the texts are captions of their image as well")
    flickr = kinds.add_parser("flickr30k-entities", help="Flickr30k Entities, a file for each split")
    flickr.add_argument("annotations", type=Path, help="folder with Sentences, Annotations, train.txt, ...")
    for kind in (coco, genome, refcoco, flickr):
        kind.add_argument("out", type=Path, help="FILE.jsonl, or a folder where the annotations name splits")
        kind.add_argument("--images", type=Path, help="folder of the images; leaves out those that are not there")
    index = kinds.add_parser("index", help="notes the line breaks of files of lines, so that opening them is quick")
    index.add_argument("files", nargs="+", help="FILE.jsonl, with {000..063} for several")
    return parser


def _lines(arguments: argparse.Namespace, skipped: Skipped) -> Iterator[Line]:
    path, images = arguments.annotations, arguments.images
    match arguments.kind:
        case "coco-instances":
            return convert_coco.convert(path, arguments.captions, images, skipped)
        case "visual-genome":
            return convert_visual_genome.convert(path, arguments.image_data, images, skipped)
        case "refcoco":
            more = {"texts": arguments.texts, "detections": arguments.detections, "as_captions": arguments.as_captions}
            return convert_refcoco.convert(path, arguments.instances, images, skipped, **more)
        case _:
            return convert_flickr30k.convert(path, images, skipped)


def _convert(arguments: argparse.Namespace) -> None:
    out, skipped, counts, boxes = arguments.out, Skipped(), Counter(), 0
    by_split = arguments.kind in _BY_SPLIT
    if by_split == (out.suffix == ".jsonl"):
        wanted = "a folder, for there is a file for each split" if by_split else "a file that ends in .jsonl"
        raise DataError(f"{arguments.kind}: '{out}' has to be {wanted}")
    with told(out), lines_writer(out) as write:
        for line in _lines(arguments, skipped):
            write(line)
            counts[line.split] += 1
            boxes += len(line.entry["elems"])
        if not counts:
            raise DataError(f"{arguments.kind}: no usable image; {skipped.line() or 'there is none'}")
    for split, count in counts.items():
        print(f"{split + ': ' if split else ''}{count} images")
    print(_printable(f"{boxes} regions; {skipped.line() or 'nothing left out'}"))


def _printable(text: str) -> str:
    """A text as one line; names and keys of annotations may be no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\n", " ")


def _index(patterns: list[str]) -> None:
    for path in (require_file(Path(name)) for pattern in patterns for name in expand(pattern)):
        with told(path):
            offsets = scan_lines(path)
            with open(offsets_file(path), "wb") as file:
                np.save(file, offsets)
        print(f"{path}: {len(offsets) - 1} lines")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    began = time.perf_counter()
    try:
        if arguments.kind == "index":
            _index(arguments.files)
        else:
            _convert(arguments)
            print(f"{arguments.out} written in {time.perf_counter() - began:.1f} s")
    except DataError as error:
        print(_printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
