"""XLA's options for programs that run a few times, which are not worth optimizing."""

FLAGS = ("--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
         "--xla_cpu_parallel_codegen_split_count=1")
