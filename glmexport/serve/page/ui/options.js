/**
 * The sampling options that the panel offers, in its order. A slider is for what is tried out by feel.
 *
 * @typedef {"temperature" | "top_p" | "top_k" | "min_p" | "repeat_penalty" | "seed" | "num_predict"} NumberOption
 * @type {{name: NumberOption, min: number, max: number, step: number, slider?: boolean}[]}
 */
export const NUMBER_OPTIONS = [
  { name: "temperature", min: 0, max: 2, step: 0.05, slider: true },
  { name: "top_p", min: 0, max: 1, step: 0.01, slider: true },
  { name: "min_p", min: 0, max: 1, step: 0.01, slider: true },
  { name: "repeat_penalty", min: 0.5, max: 2, step: 0.05, slider: true },
  { name: "top_k", min: 0, max: 100_000, step: 1 },
  { name: "num_predict", min: -1, max: 1_000_000, step: 1 },
  { name: "seed", min: 0, max: 4_294_967_295, step: 1 },
];
