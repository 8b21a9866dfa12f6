"""Files that need a GPU are not collected where there is none."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["*_gpu.py"]
