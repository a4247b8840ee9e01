"""Builds the native kernels where a C++ compiler exists; without one the installation succeeds and runs the twins.

HEADWAY_REQUIRE_KERNELS=1 in the environment makes it fail instead, as wheels want. Everything else about the package is
in pyproject.toml.
"""

import os

from setuptools import Extension, setup

# Reductions may be reordered (that is what vectorising them means); infinities and NaN keep their meaning.
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-signed-zeros", "-fassociative-math"]
# No peeling of loops to reach an aligned address: the order of a sum must not depend on where malloc put an array.
FLAGS += ["--param=vect-max-peeling-for-alignment=0"]

# Wide vectors are passed only between functions that are inlined; the other warning is about GCC's own headers.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
CPU = "src/headway/kernels/cpu"

setup(
    ext_modules=[
        Extension(
            "headway.kernels._native",
            [f"{CPU}/training.cpp", f"{CPU}/run.cpp"],
            depends=[f"{CPU}/{name}.h" for name in ("steps", "lanes", "kernels", "attention")],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=not os.environ.get("HEADWAY_REQUIRE_KERNELS"),
        )
    ]
)
