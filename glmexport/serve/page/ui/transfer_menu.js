import { fromJson, toJson, toMarkdown } from "../chat/transfer.js";
import { newId } from "../lib/id.js";
import { t } from "../i18n/index.js";
import { byId } from "../lib/dom.js";
import { download, fileName } from "../lib/files.js";
import { menu } from "./menu.js";

/**
 * Export and import.
 *
 * @param {{chat: import("../chat/controller.js").ChatController, store: import("../chat/store.js").ConversationStore,
 *   notice: (text: string) => void}} parts
 */
export function transferMenu({ chat, store, notice }) {
  const file = byId("import-file");
  const one = [byId("export-markdown"), byId("export-json")];
  byId("transfer").addEventListener("click", () => {
    for (const button of one) button.disabled = chat.current.messages.length === 0;
    byId("export-all").disabled = store.list().length === 0;
  });
  menu(byId("transfer"), byId("transfer-menu"));

  byId("export-markdown").addEventListener("click", () => {
    const words = {
      user: t("message.you"),
      assistant: t("message.assistant"),
      system: t("panel.system"),
      untitled: t("untitled"),
    };
    download(`${fileName(chat.current.title)}.md`, toMarkdown(chat.current, words), "text/markdown");
  });
  byId("export-json").addEventListener("click", () => {
    download(`${fileName(chat.current.title)}.json`, toJson([chat.current]), "application/json");
  });
  byId("export-all").addEventListener("click", () => {
    const day = new Date().toISOString().slice(0, 10);
    download(`glmexport-chats-${day}.json`, toJson(store.list()), "application/json");
  });
  byId("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    try {
      const conversations = fromJson(await chosen.text());
      notice(t("imported", { count: keep(conversations, store) }));
    } catch {
      notice(t("import.failed"));
    }
    file.value = "";
  });
}

/** @param {import("../chat/conversation.js").Conversation[]} conversations @param {import("../chat/store.js").ConversationStore} store */
function keep(conversations, store) {
  let kept = 0;
  for (const conversation of conversations) {
    if (store.get(conversation.id)) conversation.id = newId(); // beside what is here, never over it
    conversation.revision = "";
    if (store.save(conversation, { touch: false })) kept += 1;
  }
  return kept;
}
