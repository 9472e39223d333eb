/**
 * What `/api/show` says that the page shows. `defaults` there is our server's own, and complete; others tell only the
 * parameters of the Modelfile.
 *
 * @typedef {{context: number, defaults: Record<string, any>, system: string, family: string, size: string,
 *   quantization: string}} ModelFacts
 *
 * @param {any} shown
 * @returns {ModelFacts}
 */
export function modelFacts(shown) {
  const defaults = { ...readParameters(String(shown?.parameters ?? "")), ...shown?.defaults };
  const length = Object.entries(shown?.model_info ?? {}).find(([name]) => name.endsWith(".context_length"));
  return {
    context: Number(defaults.num_ctx ?? length?.[1] ?? 0) || 0,
    defaults,
    system: String(shown?.system ?? ""),
    family: String(shown?.details?.family ?? ""),
    size: String(shown?.details?.parameter_size ?? ""),
    quantization: String(shown?.details?.quantization_level ?? ""),
  };
}

/**
 * Lines of `name value`; a text is quoted, a name that comes again makes a list.
 *
 * @param {string} text
 * @returns {Record<string, any>}
 */
export function readParameters(text) {
  /** @type {Record<string, any>} */
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^\s*([a-z_]+)\s+(.+?)\s*$/.exec(line);
    if (!match) continue;
    const [, name, raw] = match;
    const value = readValue(raw);
    if (name === "stop") found.stop = [...(found.stop ?? []), String(value)];
    else found[name] = value;
  }
  return found;
}

/** @param {string} raw */
function readValue(raw) {
  try {
    return JSON.parse(raw);
  } catch {
    return raw;
  }
}
