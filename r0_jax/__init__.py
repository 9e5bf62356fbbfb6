"""R0 in JAX: few-step text-to-image generators by regularized reward maximization."""
