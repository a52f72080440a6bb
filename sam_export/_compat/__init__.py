"""Every private or version-dependent torch and ONNX interface that the package uses.

One file per part of torch. Each entry says what it stands for and what would replace it.
"""
