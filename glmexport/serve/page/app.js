/** Puts the page together: what there is, and who hears of what. */

import { Api } from "./client/api.js";
import { ChatController } from "./chat/controller.js";
import { Models } from "./chat/models.js";
import { Settings } from "./chat/settings.js";
import { ConversationStore } from "./chat/store.js";
import { t } from "./i18n/index.js";
import { byId } from "./lib/dom.js";
import { openStorage } from "./lib/storage.js";
import { appearance } from "./ui/appearance.js";
import { Banner } from "./ui/banner.js";
import { Composer } from "./ui/composer.js";
import { Drawer } from "./ui/drawer.js";
import { KeyDialog } from "./ui/key_dialog.js";
import { problemText } from "./ui/message.js";
import { Meter } from "./ui/meter.js";
import { ModelPicker } from "./ui/model_picker.js";
import { Panel } from "./ui/panel.js";
import { COMMAND, describeShortcuts, listenForShortcuts } from "./ui/shortcuts.js";
import { Sidebar } from "./ui/sidebar.js";
import { Thread } from "./ui/thread.js";
import { Toasts } from "./ui/toasts.js";
import { transferMenu } from "./ui/transfer_menu.js";

const { storage, lasting } = openStorage();
const settings = new Settings(storage);
const store = new ConversationStore(storage);
const key = new KeyDialog();
const api = new Api({ base: document.baseURI, key: () => key.value });
const models = new Models(api);
const chat = new ChatController(api, store, settings, models);

const toasts = new Toasts(byId("toasts"));
const banner = new Banner(byId("banner"));
const thread = new Thread({
  chat,
  models,
  root: byId("thread"),
  welcome: byId("welcome"),
  scroll: byId("scroll"),
  latest: byId("latest"),
  announcer: byId("announcer"),
  onCopied: (ok) => ok || toasts.show(t("copy.failed")),
});
const panel = new Panel({ chat, models, root: byId("panel-body") });
const picker = new ModelPicker({ chat, models, select: byId("model") });
const meter = new Meter({ chat, models, root: byId("meter"), near: byId("near") });
const sidebarDrawer = new Drawer({
  element: byId("sidebar"),
  openButton: byId("sidebar-open"),
  closeButton: byId("sidebar-close"),
  backdrop: byId("backdrop"),
  others: [byId("main"), byId("panel")],
  room: "(min-width: 860px)",
  open: settings.values.sidebar,
  onChange: (sidebar) => settings.update({ sidebar }),
});
const panelDrawer = new Drawer({
  element: byId("panel"),
  openButton: byId("panel-open"),
  closeButton: byId("panel-close"),
  backdrop: byId("backdrop"),
  others: [byId("main"), byId("sidebar")],
  room: "(min-width: 1180px)",
  open: settings.values.panel,
  onChange: (open) => settings.update({ panel: open }),
});
const composer = new Composer({
  chat,
  form: byId("composer"),
  text: byId("composer-text"),
  send: byId("send"),
  system: byId("composer-system"),
  editLast: () => thread.editLast(),
  openPanel: () => panelDrawer.open(),
});
const sidebar = new Sidebar({
  chat,
  store,
  root: byId("conversations"),
  onOpened: () => {
    sidebarDrawer.closeOver();
    focusComposer();
  },
  onDeleted: (conversation) => {
    const title = conversation.title || t("untitled");
    toasts.show(t("deleted", { title }), { label: t("undo"), run: () => store.save(conversation, { touch: false }) });
  },
});
transferMenu({ chat, store, notice: (text) => toasts.show(text) });

/** A focus in the message box opens a phone's keyboard over the conversation: there it is left to the reader. */
function focusComposer() {
  if (window.matchMedia("(pointer: fine)").matches) composer.focus();
}

function startNew() {
  sidebarDrawer.closeOver();
  panelDrawer.closeOver();
  chat.startNew();
  focusComposer();
}

function showTitle() {
  const title = chat.current.title || t("untitled");
  byId("title").textContent = title;
  document.title = `${title} – glmexport`;
}

/** The address names the conversation: a reload or a second tab opens the same one. */
function addressed() {
  return store.get(location.hash.slice(1));
}

function showAddress() {
  const { id } = chat.current;
  const address = store.get(id) ? `#${id}` : location.pathname + location.search;
  if (location.hash.slice(1) !== id) history.replaceState(null, "", address);
}

function showHelp() {
  byId("help-dialog").showModal();
}

function escape() {
  if (sidebarDrawer.isOver) sidebarDrawer.close();
  else if (panelDrawer.isOver) panelDrawer.close();
  else chat.stop();
}

appearance({
  settings,
  themeButton: byId("theme"),
  languageButton: byId("language"),
  onLanguage: () => {
    describeShortcuts(byId("help-keys"));
    thread.rebuild();
    panel.rebuild();
    for (const part of [sidebar, composer, picker, meter, banner]) part.update();
    showTitle();
  },
});
describeShortcuts(byId("help-keys"));
byId("new-chat-keys").textContent = `${COMMAND} K`;
byId("new-chat").addEventListener("click", startNew);
byId("help-open").addEventListener("click", showHelp);
byId("help-close").addEventListener("click", () => byId("help-dialog").close());
listenForShortcuts({
  newChat: startNew,
  focus: () => composer.focus(),
  escape,
  sidebar: () => sidebarDrawer.toggle(),
  panel: () => panelDrawer.toggle(),
  help: showHelp,
});

for (const name of ["opened", "started"]) {
  chat.on(name, showTitle);
  chat.on(name, showAddress);
}
chat.on("started", () => {
  if (document.activeElement === document.body) focusComposer(); // the button that was pressed is gone
});
chat.on("ended", async ({ conversation, message }) => {
  if (!message.error) {
    models.noteLoaded(message.model);
    return;
  }
  if (message.error.code === "unauthorized") {
    if (!(await key.ask())) return;
    models.refresh();
    if (conversation === chat.current) chat.regenerate(message);
  } else if (message.error.code === "missing") models.refresh();
});

models.on("problem", async (error) => {
  if (!error) {
    banner.clear("server");
    if (models.names.length > 0) banner.clear("models");
    else banner.show("models", () => ({ text: t("error.nomodel"), action: { label: t("error.retry"), run: refresh } }));
    return;
  }
  const text = () => problemText(error, "");
  banner.show("server", () => ({ text: text(), action: { label: t("error.retry"), run: refresh } }));
  if (error.code === "unauthorized" && (await key.ask())) refresh();
});
function refresh() {
  models.refresh();
}

store.on("full", () => banner.show("storage", () => ({ text: t("storage.full") })));
store.on("saved", () => lasting && banner.clear("storage"));
store.on("forked", () => {
  toasts.show(t("storage.forked"));
  showAddress();
});
store.on("changed", showTitle);
if (!lasting) banner.show("storage", () => ({ text: t("storage.none") }));

window.addEventListener("hashchange", () => {
  const conversation = addressed();
  if (conversation && conversation.id !== chat.current.id) chat.open(conversation);
});
window.addEventListener("online", refresh);
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && models.names.length === 0) refresh();
});

chat.open(addressed() ?? chat.current);
composer.update();
sidebar.update();
focusComposer();
models.refresh();
