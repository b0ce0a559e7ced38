"""vLLM on a CPU during training: keeps the weights that vLLM would delete after packing them.

vLLM packs the weight of each linear layer for its CPU kernels and replaces the original with an empty tensor. The first
weight update then has nothing to write to: vLLM raises, and verl's trainer, which waits for an acknowledgement, hangs.
"""


def keep_weights() -> None:
    """Entry point of `vllm.general_plugins`: vLLM calls it in each of its processes before it loads a model.

    Does nothing if vLLM does not run on a CPU. After an update verl makes vLLM pack the weights again.

    Raises:
        AttributeError: vLLM has no `dispatch_cpu_unquantized_gemm` any more.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
