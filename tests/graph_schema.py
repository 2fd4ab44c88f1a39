"""What Neuronpedia's graph-schema.json asks for, and circuit-tracer's own reader."""

TEXT, NUMBER = {"type": "string"}, {"type": ["number", "null"]}
NODE = {
    "node_id": TEXT,
    "feature": {"type": "integer"},
    "layer": TEXT,
    "ctx_idx": {"type": "integer"},
    "feature_type": TEXT,
    "jsNodeId": TEXT,
    "clerp": TEXT,
    "influence": NUMBER,
    "activation": NUMBER,
}
LINK = {"source": TEXT, "target": TEXT, "weight": {"type": "number"}}
TEXTS = {"type": "array", "items": TEXT}


def table(properties, required=None):
    return {"type": "object", "properties": properties, "required": required or list(properties)}


SCHEMA = table(
    {
        "metadata": table(
            {
                "slug": TEXT,
                "scan": TEXT,
                "prompt": TEXT,
                "prompt_tokens": TEXTS,
                "transcoder_list": TEXTS,
            }
        ),
        "qParams": table(
            {
                "pinnedIds": TEXTS,
                "supernodes": {"type": "array", "items": TEXTS},
                "linkType": TEXT,
                "clickedId": TEXT,
                "sg_pos": TEXT,
            }
        ),
        "nodes": {"type": "array", "items": table(NODE)},
        "links": {"type": "array", "items": table(LINK)},
    }
)
