"""Makes objects of their records, running the source text that comes with them."""

import types


def _reconstruct_persistent_obj(meta):
    assert meta["type"] == "class" and meta["version"] == 6
    module = types.ModuleType("from_pickle")
    exec(meta["module_src"], module.__dict__)
    obj = object.__new__(module.__dict__[meta["class_name"]])
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(meta["state"])
    else:
        obj.__dict__.update(meta["state"])
    return obj
