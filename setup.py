"""What gpunet is to pip. kernels/ and configs/ stand beside the package here and inside it in a wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "gpunet/__init__.py").read_text(encoding="utf-8")

setup(
    name="gpunet",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.M)[1],
    description="Convolutional networks: CUDA kernels on an NVIDIA GPU, the same program in NumPy without",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="gpunet contributors",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=[
        "numpy>=2",
        "pillow>=10.1",
        "tqdm",
        "annotated-types",
        "pydantic>=2",
        "typer",
        "safetensors",
        "pooch",
        "matplotlib",
        "ml-dtypes",
        "threadpoolctl",
    ],
    extras_require={
        # CuPy brings neither: without a CUDA toolkit these wheels do
        "cuda12": ["cupy-cuda12x>=14", "nvidia-cublas-cu12", "nvidia-cuda-nvrtc-cu12"],
        "cuda13": ["cupy-cuda13x>=14", "nvidia-cublas>=13,<14", "nvidia-cuda-nvrtc>=13,<14"],
        # the NumPy backend's convolutions and passes over memory, compiled; 0.61 is the first for NumPy 2.1
        "numba": ["numba>=0.61"],
        # setuptools: the tests build the wheel that they check
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "numba>=0.61",
            "nvidia-cuda-nvrtc>=13,<14",
            "setuptools>=77",
            "scipy>=1.11",  # interpolation and distributions, held against ours
            "tensorboardX",
            # exported networks are checked by the first and run by the second: wheels of 9 and 28 MB
            "onnx>=1.15",
            "onnxruntime>=1.16",
        ],
        "onnx": ["onnx>=1.15"],
        "tensorboard": ["tensorboardX"],
        "bench": ["torch"],
        # one ruff at a time: a newer one brings new rules
        "dev": ["ruff>=0.17,<0.18", "build"],
    },
    entry_points={"console_scripts": ["gpunet = gpunet.cli:main"]},
    packages=[*find_packages(include=["gpunet", "gpunet.*"]), "gpunet.kernels", "gpunet.configs"],
    package_dir={"gpunet": "gpunet", "gpunet.kernels": "kernels", "gpunet.configs": "configs"},
    package_data={
        "gpunet.kernels": ["*.cu", "*.cuh", "README.md", "emulator/**"],
        "gpunet.configs": ["*.toml"],
    },
    zip_safe=False,
)
