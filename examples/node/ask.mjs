// A stranger's client: asks a question about an image and streams the answer.
//
//   node ask.mjs ADDRESS IMAGE QUESTION [METHOD]        METHOD: METHOD_HIPRUNE, hiprune++, none, ...
//
// Knows the plain protos of this repository and nothing else of it. Prints one JSON object a line:
// {"report": ...}, then {"delta": "..."} as they come, last {"completion": ...}. An error is one line on
// stderr, its code and its details, and exit code 1.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const DEADLINE_MS = 60_000;

const [address, image, question, method = "hiprune"] = process.argv.slice(2);
if (question === undefined) {
  console.error("usage: node ask.mjs ADDRESS IMAGE QUESTION [METHOD]");
  process.exit(2);
}

const definition = loader.loadSync("hiprune/v1/llm_service.proto", {
  includeDirs: [PROTOS],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
});
const { hiprune } = grpc.loadPackageDefinition(definition);
const client = new hiprune.v1.ImageQaService(address, grpc.credentials.createInsecure());

const request = {
  messages: [
    { role: "ROLE_USER", parts: [{ media: { image: readFileSync(image) } }, { text: question }] },
  ],
  policy: { method: methodName(method) },
};

const print = (event) => console.log(JSON.stringify(event));
const stream = client.AskImage(request, { deadline: Date.now() + DEADLINE_MS });
stream.on("data", ({ report, delta, completion }) => {
  if (report) print({ report: report.media.map(summaryOf) });
  if (delta) print({ delta: delta.text });
  if (completion) print({ completion });
});
stream.on("error", ({ code, details }) => {
  console.error(`${grpc.status[code]}: ${details}`);
  process.exitCode = 1;
  client.close();
});
stream.on("end", () => client.close());

// "hiprune++" and "METHOD_HIPRUNE_PLUS_PLUS" are the same method.
function methodName(name) {
  const upper = `METHOD_${name.toUpperCase().replace("METHOD_", "").replace("++", "_PLUS_PLUS")}`;
  const known = hiprune.v1.Method.type.value.map((value) => value.name);
  if (!known.includes(upper)) {
    console.error(`method ${name}: expected one of ${known.join(", ")}`);
    process.exit(2);
  }
  return upper;
}

// What was kept of one image, short enough for a line.
function summaryOf({ views, summary, cache }) {
  const kinds = {};
  for (const kind of views.flatMap((view) => view.kinds)) kinds[kind] = (kinds[kind] ?? 0) + 1;
  return {
    method: summary.policy.method,
    tokens_before: summary.tokens_before,
    tokens_kept: summary.tokens_kept,
    kept_indices: views.map((view) => view.kept_indices),
    kinds,
    cache,
  };
}
