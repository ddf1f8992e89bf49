"""
What is stored on a `FakeServer`: training runs, checkpoints and sessions behind their endpoints.

    storage = Storage(server)
    storage.add("tinker://r1/weights/a", hours=2)
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

NOT_THERE = (404, {"error": "there is no such checkpoint."})


class Storage:
    def __init__(self, server):
        self.server = server
        self.runs, self.checkpoints, self.sessions = {}, {}, {}
        for kind, key in (
            ("checkpoints", "checkpoints"),
            ("training_runs", "runs"),
            ("sessions", "sessions"),
        ):
            server.stored["GET", kind] = lambda seen, kind=kind, key=key: self._page(
                seen, kind, list(getattr(self, key).values())
            )
        server.stored["POST", "weights_info"] = self._weights_info

    def add(self, path, hours=0.0, size=2048, public=False):
        """A checkpoint made *hours* ago, with its run."""
        run_id, segment, name = path.removeprefix("tinker://").split("/")
        made = datetime.now(timezone.utc) - timedelta(hours=hours)
        self.checkpoints[path] = {
            "checkpoint_id": f"{segment}/{name}",
            "checkpoint_type": "training" if segment == "weights" else "sampler",
            "tinker_path": path,
            "time": made.isoformat().replace("+00:00", "Z"),
            "size_bytes": size,
            "public": public,
        }
        self.add_run(run_id)
        where = f"training_runs/{run_id}/checkpoints/{segment}/{name}"
        stored = self.server.stored
        stored["GET", f"training_runs/{run_id}/checkpoints"] = lambda seen: self._of_run(run_id)
        stored["DELETE", where] = lambda seen: self._delete(path)
        stored["POST", f"{where}/publish"] = lambda seen: self._change(path, public=True)
        stored["DELETE", f"{where}/publish"] = lambda seen: self._change(path, public=False)
        stored["PUT", f"{where}/ttl"] = lambda seen: self._change(path, ttl=seen.body)

    def add_run(self, run_id, **fields):
        self.runs[run_id] = {
            "training_run_id": run_id,
            "base_model": "tiny",
            "model_owner": "me",
            "is_lora": True,
            "lora_rank": 8,
            "last_request_time": datetime.now(timezone.utc).isoformat(),
            **fields,
        }
        self.server.stored["GET", f"training_runs/{run_id}"] = (200, self.runs[run_id])

    def add_session(self, session_id, **fields):
        self.sessions[session_id] = session_id
        self.server.stored["GET", f"sessions/{session_id}"] = (
            200,
            {"training_run_ids": [], "sampler_ids": [], **fields},
        )

    def _page(self, seen, kind, things):
        limit, offset = int(seen.query["limit"]), int(seen.query["offset"])
        cursor = {"limit": limit, "offset": offset, "total_count": len(things)}
        return 200, {kind: things[offset : offset + limit], "cursor": cursor}

    def _of_run(self, run_id):
        start = f"tinker://{run_id}/"
        found = [c for path, c in self.checkpoints.items() if path.startswith(start)]
        return 200, {"checkpoints": found}

    def _delete(self, path):
        if self.checkpoints.pop(path, None) is None:
            return NOT_THERE
        return 204, b""

    def _change(self, path, **fields):
        if path not in self.checkpoints:
            return NOT_THERE
        self.checkpoints[path].update(fields)
        return 200, {}

    def _weights_info(self, seen):
        if seen.body["tinker_path"] not in self.checkpoints:
            return NOT_THERE
        return 200, {"base_model": "tiny", "is_lora": True, "lora_rank": 8, "train_mlp": True}
