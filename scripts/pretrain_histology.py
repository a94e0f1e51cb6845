"""Pre-train an encoder: accelerate launch scripts/pretrain_histology.py --config configs/pretrain/vit_b16.yaml"""

import sys

from hinge.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain-histology")
    main()
