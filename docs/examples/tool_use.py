"""Tool use with a model whose chat template has no place for tools: calls are JSON in a message.

With a template that has one, give "tools" and "tool_calls" in the rows: see docs/data.md.
"""

import json

import tinkex

SYSTEM = 'Call weather like this: {"tool": "weather", "city": ...}'


def weather(city: str) -> str:
    return "rain" if city in ("Oslo", "Lima") else "sun"


def conversation(city: str) -> dict:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"How is the weather in {city}?"},
            {"role": "assistant", "content": json.dumps({"tool": "weather", "city": city})},
            {"role": "user", "content": f"weather: {weather(city)}"},
            {"role": "assistant", "content": f"{weather(city)}."},
        ]
    }


rows = [conversation(city) for city in ("Rome", "Oslo", "Lima", "Cairo")]
with tinkex.finetune(
    rows * 6, "tiny", "run", rank=32, learning_rate=5e-3, batch_size=4, epochs=8
) as run:
    messages = rows[1]["messages"][:2]
    said = run.sample(messages, temperature=0, max_tokens=60)
    print("the model calls:", said)
    try:
        result = weather(json.loads(said)["city"])
    except (ValueError, KeyError) as exc:  # a small model may write anything
        result = f"no valid call ({exc})"
    messages += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": f"weather: {result}"},
    ]
    print("the model says:", run.sample(messages, temperature=0, max_tokens=20))
