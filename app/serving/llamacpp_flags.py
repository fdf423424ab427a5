"""The flags of ``llama-server``, as its README has them, and what of them the plan reads.

Source: llama.cpp's tools/server/README.md of commit 00dc8057
"""

from __future__ import annotations

from .command import Flags

_SWITCHES = (
    """
    agent backend-sampling cache-idle-slots cache-list cache-prompt check-tensors cont-batching context-shift
    cors-credentials cpu-moe embedding escape help ignore-eos jinja kv-offload kv-unified list-devices log-disable
    log-jsonl log-prefix log-timestamps metrics mmproj-auto mmproj-offload models-autoload no-host no-kv-offload
    no-mmproj offline
    op-offload perf props reasoning-preserve repack rerank reuse-port slots special spm-infill swa-full ui ui-mcp-proxy
    verbose version warmup mlock mmap
    """
).split()
"""Flags without a value; each has a ``--no-`` form."""
_VALUES = (
    """
    adaptive-decay adaptive-target alias api-key api-key-file api-prefix batch-size cache-ram cache-reuse cache-type-k
    cache-type-k-draft cache-type-v cache-type-v-draft chat-template chat-template-file chat-template-kwargs
    checkpoint-min-step control-vector control-vector-scaled cors-headers cors-methods cors-origins cpu-mask
    cpu-mask-batch cpu-range cpu-range-batch cpu-strict cpu-strict-batch ctx-checkpoints ctx-size defrag-thold device
    docker-repo dry-allowed-length dry-base dry-multiplier dry-penalty-last-n dry-sequence-breaker dynatemp-exp
    dynatemp-range embd-normalize fit fit-ctx fit-target flash-attn frequency-penalty gpu-layers grammar grammar-file
    hf-file hf-repo hf-token host image-max-tokens image-min-tokens json-schema json-schema-file keep
    kv-unified-per-slot lazy-mode load-mode log-colors log-file logit-bias lookup-cache-dynamic lookup-cache-static lora
    lora-scaled main-gpu mcp-servers-config mcp-servers-json media-path min-p mirostat mirostat-ent mirostat-lr
    mmproj mmproj-device mmproj-url model model-url models-dir models-max models-preset moe-cache-mib
    mtmd-batch-max-tokens n-cpu-ffn n-cpu-moe numa override-kv override-tensor parallel path poll poll-batch pooling
    port predict presence-penalty prio prio-batch reasoning reasoning-budget reasoning-budget-message reasoning-effort
    reasoning-format repeat-last-n repeat-penalty reverse-prompt rope-freq-base rope-freq-scale rope-scale rope-scaling
    rpc sampler-seq samplers seed slot-save-path split-mode sse-ping-interval ssl-cert-file ssl-key-file tags temp
    tensor-split threads threads-batch threads-http timeout tools tools-runtime top-k top-nsigma top-p typical
    ubatch-size ui-config ui-config-file verbosity video-ffmpeg-dir video-fps video-timestamp-interval xtc-probability
    xtc-threshold yarn-attn-factor yarn-beta-fast yarn-beta-slow yarn-ext-factor yarn-orig-ctx
    """
).split()
"""Flags with one value."""
_SHORT = dict(
    pair.split("=")
    for pair in """
    -C=cpu-mask -Cb=cpu-mask-batch -Cr=cpu-range -Crb=cpu-range-batch -a=alias -ag=agent -b=batch-size
    -bs=backend-sampling -c=ctx-size -cb=cont-batching -cl=cache-list -cmoe=cpu-moe -cms=checkpoint-min-step
    -cram=cache-ram -ctk=cache-type-k -ctkd=cache-type-k-draft -ctv=cache-type-v -ctvd=cache-type-v-draft
    -ctxcp=ctx-checkpoints -dev=device -dr=docker-repo -dt=defrag-thold -e=escape -fa=flash-attn -fit=fit -fitc=fit-ctx
    -fitt=fit-target -h=help -hf=hf-repo -hff=hf-file -hfr=hf-repo -hft=hf-token -j=json-schema -jf=json-schema-file
    -kvo=kv-offload -kvu=kv-unified -l=logit-bias -lcd=lookup-cache-dynamic -lcs=lookup-cache-static -lm=load-mode
    -lv=verbosity -lzm=lazy-mode -m=model -mg=main-gpu -mm=mmproj -mmdev=mmproj-device
    -mmu=mmproj-url -mu=model-url -n=predict --n-predict=predict -ncffn=n-cpu-ffn -ncmoe=n-cpu-moe -ngl=gpu-layers
    --n-gpu-layers=gpu-layers -nkvo=no-kv-offload -nocb=no-cont-batching -np=parallel -nr=no-repack -ot=override-tensor
    -r=reverse-prompt -rea=reasoning -s=seed -sm=split-mode -sp=special -t=threads -tb=threads-batch -to=timeout
    -ts=tensor-split -ub=ubatch-size -v=verbose --embeddings=embedding --reranking=rerank --temperature=temp
    --webui=ui --typical-p=typical --usage=help --log-verbosity=verbosity --log-verbose=verbose
    """.split()
)
"""Other spellings."""
_HONOURED = (
    """
    cache-type-k cache-type-v cpu-moe ctx-size fit fit-ctx fit-target flash-attn gpu-layers hf-repo model n-cpu-ffn
    n-cpu-moe parallel swa-full ubatch-size
    """
).split()
"""Flags that the plan reads."""
_MANY = "several cards are not planned for llama.cpp yet"
_DRAFT = "a draft model's weights and cache are not modelled"
_TOWER = "the encoder of images is not modelled"
_REFUSED = {
    "cache-list": "it starts no server",
    "control-vector": "its buffers are not modelled",
    "control-vector-scaled": "its buffers are not modelled",
    "help": "it starts no server",
    "kv-unified-per-slot": "a cache sized by slots is not modelled; --ctx-size is",
    "list-devices": "it starts no server",
    "lora": "the buffers of adapters are not modelled here",
    "lora-scaled": "the buffers of adapters are not modelled here",
    "mmproj": _TOWER,
    "mmproj-url": _TOWER,
    "models-dir": "a router of several models is not planned",
    "models-preset": "a router of several models is not planned",
    "moe-cache-mib": "a cache of experts is not modelled",
    "cache-type-k-draft": _DRAFT,
    "cache-type-v-draft": _DRAFT,
    "no-kv-offload": "where the cache lies is not modelled otherwise than on the card",
    "override-kv": "a changed model is not planned: send the changed config.json",
    "override-tensor": "tensors placed by pattern are not modelled; --n-cpu-moe and --gpu-layers are",
    "rpc": _MANY,
    "split-mode": _MANY,
    "tensor-split": _MANY,
    "version": "it starts no server",
}
"""Flags that change memory in a way that is not modelled, each with the sentence that says so."""

FLAGS = Flags(
    starts=(("llama-server",), ("llama", "server")),
    values=frozenset(_VALUES),
    switches=frozenset(_SWITCHES),
    lists=frozenset(),
    short=_SHORT,
    honoured=frozenset(_HONOURED),
    refused=_REFUSED,
)
"""The flags of ``llama-server``."""
