import { readLines } from "./ndjson.js";

/**
 * @typedef {"unreachable" | "unauthorized" | "missing" | "busy" | "refused" | "server" | "cut" | "unreadable"} Problem
 * @typedef {{code: Problem, status: number, detail: string, retryAfter: number}} Failure
 * @typedef {{name: string, size?: number, details?: Record<string, any>}} ModelEntry
 */

export class ApiError extends Error {
  /** @param {Problem} code @param {{status?: number, detail?: string, retryAfter?: number}} [facts] */
  constructor(code, { status = 0, detail = "", retryAfter = 0 } = {}) {
    super(detail || code);
    this.code = code;
    this.status = status;
    this.detail = detail;
    this.retryAfter = retryAfter;
  }

  /** What is kept with a message: it must survive JSON. @returns {Failure} */
  toJSON() {
    return { code: this.code, status: this.status, detail: this.detail, retryAfter: this.retryAfter };
  }
}

/** @type {Record<number, Problem>} */
const PROBLEMS = { 401: "unauthorized", 404: "missing", 429: "busy", 503: "busy" };

/** The server's Ollama surface, as far as the page needs it. */
export class Api {
  #base;
  #key;

  /** @param {{base: string, key: () => string | null}} options */
  constructor({ base, key }) {
    this.#base = base;
    this.#key = key;
  }

  /** @param {AbortSignal} [signal] @returns {Promise<ModelEntry[]>} */
  async models(signal) {
    const { models } = await this.#json("GET", "api/tags", undefined, signal);
    return Array.isArray(models) ? models.filter((model) => typeof model?.name === "string") : [];
  }

  /** @param {string} model @param {AbortSignal} [signal] @returns {Promise<any>} */
  show(model, signal) {
    return this.#json("POST", "api/show", { model }, signal);
  }

  /** Names of the models in memory. @param {AbortSignal} [signal] @returns {Promise<string[]>} */
  async running(signal) {
    const { models } = await this.#json("GET", "api/ps", undefined, signal);
    return Array.isArray(models) ? models.map((model) => String(model?.name ?? "")) : [];
  }

  /**
   * @param {{model: string, messages: {role: string, content: string}[], options: Record<string, unknown>}} request
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any>} chunks; the last one has `done: true`
   */
  async *chat(request, signal) {
    const response = await this.#send("POST", "api/chat", { ...request, stream: true }, signal);
    if (!response.body) throw new ApiError("unreadable");
    let finished = false;
    try {
      for await (const chunk of readLines(response.body)) {
        if (chunk?.error) throw new ApiError("server", { status: response.status, detail: String(chunk.error) });
        finished ||= chunk?.done === true;
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ApiError(error instanceof SyntaxError ? "unreadable" : "cut");
    }
    if (!finished) throw new ApiError("cut");
  }

  /** @param {string} method @param {string} path @param {unknown} body @param {AbortSignal} [signal] */
  async #json(method, path, body, signal) {
    const response = await this.#send(method, path, body, signal);
    try {
      return await response.json();
    } catch {
      throw new ApiError("unreadable", { status: response.status });
    }
  }

  /** @param {string} method @param {string} path @param {unknown} body @param {AbortSignal} [signal] */
  async #send(method, path, body, signal) {
    /** @type {Record<string, string>} */
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    const key = this.#key();
    if (key) headers.Authorization = `Bearer ${key}`;
    const request = { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) };
    let response;
    try {
      response = await fetch(new URL(path, this.#base), { ...request, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError("unreachable");
    }
    if (response.ok) return response;
    const problem = PROBLEMS[response.status] ?? (response.status < 500 ? "refused" : "server");
    const retryAfter = Number.parseFloat(response.headers.get("Retry-After") ?? "") || 0;
    throw new ApiError(problem, { status: response.status, detail: await reason(response), retryAfter });
  }
}

/** @param {Response} response */
async function reason(response) {
  try {
    const { error } = await response.json();
    return typeof error === "string" ? error : String(error?.message ?? "");
  } catch {
    return "";
  }
}
