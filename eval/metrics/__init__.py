"""Depth metrics: how layers, sublayers, sources and slots contribute to the predictions of a causal language model.

Sources of the metrics, by the names in the docstrings:

    CoD-S       arXiv 2603.15389, code in github.com/pUmpKin-Co/SparsityAndCoD
    DepthBench  arXiv 2609.32534, code in github.com/keyu-wang-2002/DepthBench
    EFF         "Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898
    LNS         "The Curse of Depth in Large Language Models" (LayerNorm Scaling), arXiv 2502.05795
    ShortGPT    "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853
"""
