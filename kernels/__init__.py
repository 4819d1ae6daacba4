"""The Triton kernel, installed as `ersde_fast.kernels`."""

if __name__ == "kernels":
    raise ImportError("import ersde_fast.kernels: this folder is that package, not a top-level `kernels`")
