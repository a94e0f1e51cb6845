"""Train HINGE on one or several devices: accelerate launch scripts/train.py --config configs/her2st.yaml"""

import sys

from hinge.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
