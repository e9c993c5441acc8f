"""Builds the C++ kernels; everything else about the package is in pyproject.toml.

Where they cannot be built (no compiler), the package is installed without them and runs on plain torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


class OptionalBuildExtension(BuildExtension):
    """Reports a failed build and goes on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.extensions = []
            warnings.warn(
                f"The C++ kernels were not built, so loku_kernels will run on plain torch, slowly, on CPUs: {error}",
                stacklevel=1,
            )


kernels = CppExtension(
    "loku_kernels._C",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    include_dirs=[str(Path("csrc").resolve())],
    # The stable ABI of torch 2.10: what is built against any later torch loads in it. No Python header is used.
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wno-uninitialized",  # g++ 12 finds fault with its own intrinsics
        "-Wno-maybe-uninitialized",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ],
    py_limited_api=True,
)

setup(
    packages=[
        *find_packages(include=["loku_kernels", "loku_kernels.*"]),
        *find_packages("python"),
        "loku.cli.presets",
    ],
    package_dir={"": ".", "loku_kernels": "loku_kernels", "loku": "python/loku"},
    package_data={
        "loku_kernels": ["py.typed"],
        "loku.cli.presets": ["*.yaml"],
        "loku": ["py.typed", "demo/people.yaml", "report/*.j2"],
    },
    ext_modules=[kernels],
    cmdclass={"build_ext": OptionalBuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
