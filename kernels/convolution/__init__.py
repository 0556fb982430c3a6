"""The float32 convolution of training on the CPU: C++ forward, input gradient and weight gradient."""
