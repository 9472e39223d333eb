/** @param {string} name @param {string} text @param {string} type */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000); // a browser may ask where to save first
}

/** A file's name from a title, kept short and free of what file systems refuse. @param {string} title */
export function fileName(title) {
  const name = title.replace(/[\u0000-\u001f"*/:<>?\\|]+/g, " ").replace(/\s+/g, " ").trim();
  return [...name].slice(0, 60).join("").trim().replace(/^\.+|\.+$/g, "") || "chat";
}
