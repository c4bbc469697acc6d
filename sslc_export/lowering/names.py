"""The names that a lowered model carries: its operator, and its metadata. Nothing heavy is imported here."""

# The operator (docs/architecture.md).
DOMAIN = "sslc"
OP_TYPE = "LowRankSparseLinear"
VERSION = 1
LAYOUT = "rows64"
WITH_SCALES = "scales"  # the overload of the body for nodes with int8 values, which have scales
WITH_INT4 = "int4"  # the overload for nodes with packed int4 values, which have scales, too
INPUTS = ("X", "bitmap", "values", "U", "V", "bias", "scales")  # the last only with int8 and int4 values

# Graph inputs and outputs beside input_ids, attention_mask and position_ids.
LOGITS = "logits"
PAST = "past_key_values."  # .N.key, .N.value

# Keys of the model's metadata, and what their values mean.
FORMAT_VERSION_KEY = "sslc.format_version"
FORMAT_VERSION = "1"
CONFIG_KEY = "sslc.config_sha256"  # of the checkpoint's config.json
MODEL_TYPE_KEY = "sslc.model_type"  # as in config.json
DENSE_LAYERS_KEY = "sslc.dense_layers"  # JSON list of the names of the linear layers that are dense


def present(past: str) -> str:
    """The output that is the next call's input `past`."""
    return "present." + past.removeprefix(PAST)
