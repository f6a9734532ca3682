"""What CPU kernels share: emitted LLVM code, the layout of weights, and how products are cut."""
