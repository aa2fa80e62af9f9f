"""The installer's way in: it compiles our CPU kernels; all metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

folder = Path("resnet_kernels/kernels/cpu")

# A library that knows nothing of Python: it is loaded with ctypes, and one build serves all versions from 3.10 on. It is
# optional: where no C compiler can build it, the package runs on oneDNN, and `python -m resnet_kernels env` says why.
convolution = Extension(
    "resnet_kernels.kernels.cpu._convolution",
    [str(folder / name) for name in ("run.c", "program.c", "portable.c", "avx2.c", "avx512.c")],
    depends=sorted(map(str, folder.glob("*.h"))),
    # Each file selects its own instruction set. gnu11 lets a * b + c be one FMA.
    extra_compile_args=["-std=gnu11", "-O2", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[convolution], options={"bdist_wheel": {"py_limited_api": "cp310"}})
