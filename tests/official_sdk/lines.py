"""Lines of scripts for the official SDK that did not run with `import tinkex as tinker` once.

test_lines.py runs each; `python -m tests.official_sdk.lines` writes the table of them into
docs/compatibility.md. "Before" is tinkex before it had the official surface: each of these failed
there.
"""

from __future__ import annotations

from tests.official_sdk import page

#: Names that the lines use: `tinker` is tinkex; service, training, sampler and rest are its
#: clients, state and weights are paths of checkpoints, data and prompt are small.
LINES = (
    "tinker.AdamParams(learning_rate=1e-4)",
    "tinker.Datum(tinker.ModelInput.from_ints([1, 2]), {'target_tokens': [2, 3]})",
    "tinker.SamplingParams(max_tokens=1), tinker.LoraConfig(rank=4), tinker.APIFuture",
    "tinker.TensorData(data=[1.0], dtype='float32', shape=[1])",
    "tinker.TensorData.from_numpy(array).data + [0.5]",
    "tinker.BadRequestError, tinker.RateLimitError, tinker.APITimeoutError",
    "tinker.ServiceClient({'user': 'me'}, base_url=url, api_key=key)",
    "tinker.ServiceClient(base_url=url, api_key=key, display_name='mine', timeout=60.0)",
    "service.create_lora_training_client('tiny', rank=4).result()",
    "service.create_lora_training_client('tiny', 4, optimizer=tinker.AdamOptimizerConfig())",
    "service.create_training_client_from_state(state, base_model='tiny').result()",
    "service.create_training_client_from_state(state, weights_access_token=key).result()",
    "service.create_sampling_client(model_path=weights).result()",
    "service.create_sampling_client(base_model='tiny', record_stability_info=True)",
    "await asyncio.create_task(service.create_sampling_client_async(base_model='tiny'))",
    "await asyncio.create_task(service.create_lora_training_client_async('tiny', rank=4))",
    "training.save_weights_and_get_sampling_client(name='sampler').result()",
    "training.save_weights_and_get_sampling_client().sample(prompt, 1, params).result()",
    "training.save_weights_and_get_sampling_client(kind='inflight').result()",
    "training.save_state('other', 3600).result()",
    "training.forward_backward_custom(data, loss, loss_type_input='logprobs').result()",
    "training.optim_step(optim_params=tinker.AdamParams()).result()",
    "training.optim_step().result()",
    "await (await training.forward_backward_async(data, 'cross_entropy')).result_async()",
    "await (await training.optim_step_async(tinker.AdamParams())).result_async()",
    "(await sampler.sample_async(prompt, 1, params)).sequences[0].tokens",
    "await rest.list_training_runs_async()",
    "rest.list_training_runs(project_id='mine').result().training_runs",
    "rest.get_session(service.session_id).result()",
    "rest.search_sessions(types.SessionSearchRequest())",
    "rest.assign_session_project(service.session_id, 'mine').result()",
    "rest.get_external_weights_urls(external).result().urls",
    "rest.get_checkpoint_archive_url_from_tinker_path(weights).result().url",
    "rest.get_checkpoint_archive_url(training.model_id, 'sampler_weights/kept').result().url",
    "tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())",
)

HEAD = """
## Lines of such scripts

Lines of scripts for the official SDK that run as they are, with tinkex in its place. A test runs
each of them.

"""


def section() -> str:
    """The part of docs/compatibility.md."""
    return HEAD + page.table(["Line"], [[f"`{line}`"] for line in LINES])


if __name__ == "__main__":
    page.write("lines", section())
