"""Names of torch functions by how a NaN comes out of their derivative; all others are taken one input at a time."""

# linear functions, which make no NaN out of a 0, and functions that return no tensor; a view stays a view of its base
FREE = frozenset(
    {
        "__get__", "__set__", "__getitem__", "__setitem__", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__",
        "__isub__", "__neg__", "__len__", "__bool__", "__repr__", "__format__", "__hash__", "__eq__", "__ne__",
        "__lt__", "__le__", "__gt__", "__ge__", "add", "sub", "rsub", "subtract", "neg", "negative", "positive",
        "sum", "mean", "cumsum", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "split", "chunk",
        "unbind", "tensor_split", "view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "broadcast_to",
        "broadcast_tensors", "repeat", "repeat_interleave", "tile", "flatten", "unflatten", "ravel", "squeeze",
        "unsqueeze", "transpose", "swapaxes", "permute", "movedim", "moveaxis", "t", "flip", "roll", "narrow",
        "select", "index_select", "gather", "take", "take_along_dim", "diagonal", "diag", "unfold", "pad",
        "contiguous", "clone", "detach", "to", "type", "double", "float", "half", "bfloat16", "cpu", "cuda", "where",
        "masked_fill", "tril", "triu", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
        "randn_like", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty", "size", "stride", "dim",
        "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "is_contiguous", "eq", "ne", "lt", "le",
        "gt", "ge", "isnan", "isinf", "isfinite", "isclose", "equal", "allclose", "any", "all", "argmax", "argmin",
        "argsort", "floor", "ceil", "round", "sign", "item", "tolist", "numpy", "register_hook", "retain_grad",
        "requires_grad_", "data_ptr", "element_size", "backward", "grad",
    }
)  # fmt: skip

# linear where all but one of the inputs are numbers
SCALED = frozenset({"mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__div__", "__truediv__"})

# whose derivatives of every order are finite at finite inputs
BOUNDED = frozenset({"sigmoid", "tanh", "sin", "cos", "erf", "atan", "arctan", "softplus", "logsigmoid"})

# of several inputs that broadcast: backward sums the rows of what is shared
ELEMENTWISE = frozenset(
    {
        "mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__div__", "__rdiv__",
        "__truediv__", "__rtruediv__", "pow", "float_power", "__pow__", "__rpow__", "atan2", "arctan2", "hypot",
        "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2", "xlogy", "xlog1py", "lerp", "addcmul",
        "addcdiv", "fmod", "remainder",
    }
)  # fmt: skip

# sums of products over rows, in which what is not finite makes every answer that it enters not finite
CONTRACTIONS = frozenset(
    {
        "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "addmm",
        "addbmm", "baddbmm", "addmv", "addr", "einsum", "tensordot", "linear", "bilinear", "conv1d", "conv2d",
        "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "layer_norm", "group_norm", "rms_norm",
    }
)  # fmt: skip
