"""Extract features with an encoder of your own: any timm model with weights in a local folder.

python examples/own_encoder.py SLIDES SAMPLE OUTPUT
"""

import json
import sys
from pathlib import Path

import timm
from safetensors.torch import save_file

import hinge


def main(slides: str, sample: str, output: Path) -> None:
    # in place of this: your training. The weights here are random.
    network = timm.create_model("test_vit", num_classes=0)
    folder = output / "encoder"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": network.pretrained_cfg})
    )

    encoder = hinge.load_encoder(str(folder))
    print(f"{encoder.name}: {encoder.dim} features of patches of {encoder.patch_um:g} µm")
    slide = hinge.read_slide(slides, sample)
    path = hinge.extract_features(slide, encoder, output / f"{sample}.h5")
    print(f"features: {path}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
