// Talks to /v1/realtime: microphone and camera to the server, words and audio back.
import { Microphone, Player, RATE, toFloats } from "/static/audio.js";
import { $, addEntry, addWav, addWords, draw, showLatency, status } from "/static/view.js";

const FRAMES_PER_S = 2; // of the camera
const PAUSE_MS = 500; // that ends a turn of an open microphone
const CLICK_MS = 200; // a press of the button that is shorter says nothing
const START_MS = 5000; // that an audio device may take to begin, once the answer is complete
const PICTURE_SIZE = 1024; // pixels
const MAX_PICTURE = 700_000; // characters of a data: URL; a message has at most 1 MiB
const EXAMPLES = [
  { text: "say the red circle is above the blue square" },
  { text: "where is the red circle", picture: "/static/scene.png" },
  { text: "what color is the circle", picture: "/static/color.png" },
  { text: "which digit is this", picture: "/static/digit.png" },
];
const ABOUT_TINY =
  "This small model knows colored shapes, handwritten digits, short clips and about 60 words. " +
  "It answers each question by itself and holds no conversation: click a picture in it to ask " +
  "about that picture again. Of what the camera sees it understands only colored shapes drawn " +
  "flat on a plain background. Write without capital letters. Click, or say one of these:";

const state = {
  socket: null,
  connected: false, // whether the server took the socket
  player: null, // a promise, from the first click on
  mute: false, // whether the user was told that there is no audio
  microphone: null, // a promise, from the first use on
  camera: null,
  picture: null, // data: URL of the next question
  open: false, // open microphone, or hold to talk
  holding: false,
  heldAt: 0, // when the button was pressed
  questions: 0,
  asked: new Map(), // questions whose answer has not begun: number -> {askedAt, cancelled}
  spokenAt: 0, // when the last turn of the open microphone ended
  answer: null, // the answer that arrives or plays
};
window.minomni = { state, played: [], errors: [] }; // for tests

function fail(message) {
  window.minomni.errors.push(message);
  addEntry("error", message);
}

/** Why a device cannot be used. WebKit calls a missing one a wrong constraint. */
function reason(error) {
  if (!window.isSecureContext) return "browsers allow it on https and on localhost only";
  return error.name === "OverconstrainedError" ? "none was found" : error.message;
}

function ready() {
  status(state.open ? "listening" : "ready");
}

// -------------------------------------------------------------------------------------- connection
function start() {
  connect().catch((error) => fail(`the server does not answer: ${error.message}`));
}

async function connect() {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch("/v1/models", { headers });
  if (response.status === 401) {
    $("wrong").hidden = !token;
    $("ask").showModal();
    return;
  }
  const content = await response.json();
  if (!response.ok) throw new Error(content.error.message);
  const [model] = content.data;
  for (const voice of model.voices) $("voice").append(new Option(voice, voice));
  $("voice").disabled = !model.speech;
  if (model.trained_here) showExamples();
  else $("examples").hidden = true;

  const address = new URL("/v1/realtime", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.searchParams.set("model", model.id);
  const protocols = ["realtime", ...(token ? [`openai-insecure-api-key.${token}`] : [])];
  const socket = new WebSocket(address, protocols);
  state.socket = socket;
  socket.onopen = () => {
    state.connected = true;
    sendTurnDetection();
    status(`${model.id} is ready`);
  };
  socket.onclose = disconnected;
  socket.onmessage = ({ data }) => receive(JSON.parse(data));
}

/** A browser does not tell a page why its WebSocket was refused; the server's numbers do. */
async function disconnected() {
  const wasReady = state.connected;
  state.connected = false;
  if (!wasReady && (await isFull())) {
    status("all sessions of the server are in use; reload the page later");
    return;
  }
  status("disconnected; reload the page to begin again");
}

async function isFull() {
  const response = await fetch("/health").catch(() => null);
  const { sessions, max_sessions } = response?.ok ? await response.json() : {};
  return sessions >= max_sessions; // false without numbers
}

function send(event) {
  if (state.socket?.readyState === WebSocket.OPEN) state.socket.send(JSON.stringify(event));
}

/** The chosen voice, as session.update and response.create hold it. Text needs none. */
function chosenVoice() {
  const { value, disabled } = $("voice");
  return value && !disabled ? { output: { voice: value } } : {};
}

/** With an open microphone the server begins the answer by itself, in the session's voice. */
function sendVoice() {
  send({ type: "session.update", session: { type: "realtime", audio: chosenVoice() } });
}

function sendTurnDetection() {
  const detection = state.open ? { type: "server_vad", silence_duration_ms: PAUSE_MS } : null;
  const audio = { input: { turn_detection: detection }, ...chosenVoice() };
  send({ type: "session.update", session: { type: "realtime", audio } });
}

function sendItem(part) {
  const item = { type: "message", role: "user", content: [part] };
  send({ type: "conversation.item.create", item });
}

// ------------------------------------------------------------------------------------------ events
const HANDLERS = {
  "input_audio_buffer.speech_started"() {
    stopAnswer(false); // the server has cancelled it already
    status("listening");
  },
  "input_audio_buffer.speech_stopped"() {
    state.spokenAt = performance.now();
    addEntry("user", "(spoken)");
    status("thinking");
  },
  "response.created"({ response }) {
    const question = response.metadata?.question;
    const asked = state.asked.get(question) ?? { askedAt: state.spokenAt, pauseMs: PAUSE_MS };
    state.asked.delete(question);
    if (asked.cancelled) return;
    state.answer = { ...asked, id: response.id, chunks: [], playing: false };
    $("stop").disabled = false;
  },
  "response.output_item.added"({ response_id, item }) {
    const { answer } = state;
    if (answer?.id !== response_id) return;
    answer.item = item.id;
    answer.entry = addEntry("model", "");
    answer.entry.setAttribute("aria-busy", "true");
    toPlayer({ kind: "begin", item: item.id });
  },
  "response.output_audio_transcript.delta": receiveWords,
  "response.output_text.delta": receiveWords,
  "response.output_audio.delta"({ item_id, delta }) {
    const { answer } = state;
    if (answer?.item !== item_id) return;
    const samples = toFloats(delta);
    answer.chunks.push(samples);
    answer.playing = true;
    status("speaking");
    toPlayer({ kind: "chunk", item: item_id, samples });
  },
  "response.output_audio.done"({ item_id }) {
    toPlayer({ kind: "complete", item: item_id });
  },
  "response.done"({ response }) {
    const { answer } = state;
    if (answer?.id !== response.id) return;
    answer.done = true;
    answer.timings = response.timings;
    answer.entry.removeAttribute("aria-busy");
    if (response.status === "cancelled") answer.entry.classList.add("cut");
    if (response.status === "failed") answer.entry.remove();
    else keepAudio(answer);
    measure(answer);
    if (answer.playing) checkAudio(answer);
    else finish();
  },
  error({ error }) {
    state.asked.delete(error.event_id);
    if (error.code === "response_cancel_not_active") return; // it has ended by itself meanwhile
    fail(error.message);
    if (!state.answer && !state.asked.size) ready();
  },
};

function receive(event) {
  HANDLERS[event.type]?.(event);
}

function receiveWords({ item_id, delta }) {
  if (state.answer?.item === item_id) addWords(state.answer.entry, delta);
}

function toPlayer(message) {
  state.player?.then((player) => player.send(message), () => {}); // without a player, words only
}

function played(message) {
  window.minomni.played.push(message);
  const { answer } = state;
  if (message.kind === "first" && answer?.item === message.item) {
    answer.firstMs = performance.now() - answer.askedAt;
    measure(answer);
  }
  if (message.kind === "stopped" && message.item) {
    const heardMs = Math.floor((message.played * 1000) / RATE);
    const about = { item_id: message.item, content_index: 0, audio_end_ms: heardMs };
    send({ type: "conversation.item.truncate", ...about });
  }
  if (message.kind === "stopped") state.stopped?.();
  if (message.kind === "ended" && answer?.item === message.item) finish();
}

function measure({ timings, firstMs, pauseMs }) {
  if (timings?.audio == null || firstMs === undefined) return;
  window.minomni.latency = showLatency(timings, firstMs, pauseMs);
}

function keepAudio(answer) {
  if (!answer.chunks.length || answer.kept) return;
  answer.kept = true;
  addWav(answer.entry, answer.chunks);
}

function finish() {
  state.answer = null;
  $("stop").disabled = true;
  ready();
}

/** Silence the answer. The player then says how much was heard, which the server is told. */
function stopAnswer(cancel = true) {
  let runs = false;
  for (const asked of state.asked.values()) {
    runs ||= !asked.cancelled;
    asked.cancelled = true;
  }
  const { answer } = state;
  if (answer) {
    runs ||= !answer.done;
    answer.entry?.classList.add("cut");
    answer.entry?.removeAttribute("aria-busy");
  }
  state.answer = null;
  $("stop").disabled = true;
  if (runs && cancel) send({ type: "response.cancel" });
  if (!answer?.playing) return Promise.resolve();
  return new Promise((resolve) => {
    state.stopped = resolve;
    toPlayer({ kind: "stop" });
    state.player.then((player) => player.running || resolve(), resolve);
  });
}

// --------------------------------------------------------------------------------------- questions
/** The player. Browsers let a page make audio after a click only, and may suspend it later. */
async function openPlayer() {
  state.player ??= Player.open(played).then((player) => {
    draw(player.analyser);
    return player;
  });
  const player = await state.player;
  player.context.resume().catch(() => {}); // checkAudio() tells
  return player;
}

/** Tell the user once that answers are words only. */
function noAudio(why) {
  if (!state.mute) fail(`no audio: ${why}`);
  state.mute = true;
}

/** End a complete answer that the browser does not play. */
async function checkAudio(answer) {
  const player = await state.player.catch(() => null);
  await player?.resume(START_MS).catch(() => {}); // a short answer may be faster than the device
  if (player?.running || state.answer !== answer) return;
  noAudio("is a loudspeaker connected?");
  finish();
}

/** The microphone. Tells the user why there is none, and returns null. */
async function openMicrophone() {
  try {
    const player = await openPlayer();
    await player.resume(); // its samples come by the same way
    state.microphone ??= Microphone.open(player, (audio) => {
      send({ type: "input_audio_buffer.append", audio });
    });
    return await state.microphone;
  } catch (error) {
    state.microphone = null;
    fail(`no microphone: ${reason(error)}`);
    return null;
  }
}

/** Ask for the answer to what was given until `askedAt`. */
function ask(askedAt = performance.now()) {
  stopAnswer();
  state.questions += 1;
  const question = String(state.questions);
  state.asked.set(question, { askedAt, cancelled: false });
  const response = { metadata: { question }, audio: chosenVoice() };
  send({ type: "response.create", event_id: question, response });
  status("thinking");
}

function takePicture() {
  const { picture } = state;
  setPicture(null);
  return picture;
}

function givePicture(picture) {
  if (!picture) return;
  sendItem({ type: "input_image", image_url: picture });
  addEntry("user", "", picture, () => setPicture(picture));
}

/**
 * Ask a typed question about a picture: by default, about the one that was chosen, or else about
 * what the camera sees.
 */
async function askText(text, picture = takePicture() ?? cameraFrame()) {
  await openPlayer().catch((error) => noAudio(reason(error))); // words without it
  await stopAnswer(); // the server learns what was heard before the next question
  givePicture(picture);
  sendItem({ type: "input_text", text });
  addEntry("user", text);
  ask();
}

async function holdBegin() {
  if (state.holding) return;
  state.holding = true;
  $("hold").setAttribute("aria-pressed", "true");
  if (state.open) await setOpen(false);
  const microphone = await openMicrophone();
  if (!microphone) holdEnd();
  if (!state.holding) return; // let go while the browser asked for permission
  stopAnswer();
  givePicture(takePicture());
  status("listening");
  state.heldAt = performance.now();
  microphone.begin();
}

async function holdEnd() {
  if (!state.holding) return;
  state.holding = false;
  $("hold").setAttribute("aria-pressed", "false");
  const microphone = await state.microphone;
  if (!microphone?.listening) return;
  const endedAt = performance.now();
  if (endedAt - state.heldAt < CLICK_MS) {
    microphone.end(() => send({ type: "input_audio_buffer.clear" }));
    status("hold the button while you speak");
    return;
  }
  addEntry("user", "(spoken)");
  microphone.end(() => {
    send({ type: "input_audio_buffer.commit" });
    ask(endedAt);
  });
}

async function setOpen(on) {
  const microphone = on ? await openMicrophone() : await state.microphone;
  if (!microphone) return;
  if (on) givePicture(takePicture());
  state.open = on;
  sendTurnDetection();
  $("open").setAttribute("aria-pressed", String(on));
  if (on) microphone.begin();
  else microphone.end(() => send({ type: "input_audio_buffer.clear" })); // half a question
  ready();
}

// ---------------------------------------------------------------------------------------- pictures
function setPicture(url) {
  state.picture = url;
  $("picked").hidden = !url;
  if (url) $("preview").src = url;
}

/** Keep a picture for the next question. */
async function choosePicture(file) {
  try {
    setPicture(await toDataUrl(file));
  } catch {
    fail("this file is no picture that the browser can read");
  }
}

/** A picture of any size as a data: URL that fits into a message. */
async function toDataUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, PICTURE_SIZE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  let url = canvas.toDataURL("image/png");
  for (const quality of [0.9, 0.6, 0.3]) {
    if (url.length < MAX_PICTURE) break;
    url = canvas.toDataURL("image/jpeg", quality);
  }
  return url;
}

async function setCamera(on) {
  if (on) {
    $("camera").disabled = true;
    try {
      const video = { width: 320, height: 240, facingMode: "environment" }; // rear
      state.camera = await navigator.mediaDevices.getUserMedia({ video });
      $("view").srcObject = state.camera;
      await $("view").play();
    } catch (error) {
      state.camera?.getTracks().forEach((track) => track.stop());
      state.camera = null;
      fail(`no camera: ${reason(error)}`);
      return;
    } finally {
      $("camera").disabled = false;
    }
    state.frames = setInterval(sendFrame, 1000 / FRAMES_PER_S);
  } else {
    clearInterval(state.frames);
    state.camera?.getTracks().forEach((track) => track.stop());
    state.camera = null;
  }
  $("view").hidden = !on;
  $("camera").setAttribute("aria-pressed", String(on));
}

/** What the camera sees now as a data: URL; null while it is off. */
function cameraFrame() {
  if (!state.camera) return null;
  const view = $("view");
  const canvas = document.createElement("canvas");
  canvas.width = 320;
  canvas.height = Math.round((320 * view.videoHeight) / view.videoWidth) || 240;
  canvas.getContext("2d").drawImage(view, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.85);
}

async function sendFrame() {
  const microphone = await state.microphone;
  if (!microphone?.listening) return;
  const frame = cameraFrame();
  if (!frame) return; // switched off meanwhile
  const [, image] = frame.split(",");
  send({ type: "input_video_frame.append", image });
}

// ---------------------------------------------------------------------------------------- controls
function showExamples() {
  $("about").textContent = ABOUT_TINY;
  for (const { text, picture } of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    if (picture) {
      const image = document.createElement("img");
      image.src = picture;
      image.alt = "";
      button.append(image);
    }
    button.append(text);
    button.onclick = async () => {
      const response = picture ? await fetch(picture) : null;
      await askText(text, response ? await toDataUrl(await response.blob()) : null);
    };
    const entry = document.createElement("li");
    entry.append(button);
    $("list").append(entry);
  }
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  askText(text);
};
$("hold").onpointerdown = (event) => {
  $("hold").setPointerCapture(event.pointerId);
  holdBegin();
};
$("hold").onpointerup = holdEnd;
$("hold").onpointercancel = holdEnd;
$("hold").oncontextmenu = (event) => event.preventDefault();
$("hold").onkeydown = (event) => {
  if (![" ", "Enter"].includes(event.key)) return;
  event.preventDefault();
  if (!event.repeat) holdBegin();
};
$("hold").onkeyup = (event) => {
  if (![" ", "Enter"].includes(event.key)) return;
  event.preventDefault(); // it would click
  holdEnd();
};
$("hold").onblur = holdEnd;
// Screen readers press a button without pointer or key: the first press begins, the next one ends.
$("hold").onclick = (event) => {
  if (event.detail !== 0) return;
  if (state.holding) holdEnd();
  else holdBegin();
};
$("open").onclick = () => setOpen(!state.open);
$("camera").onclick = () => setCamera(!state.camera);
$("voice").onchange = sendVoice;
$("stop").onclick = () => {
  stopAnswer();
  status("stopped");
};
document.onkeydown = ({ key }) => {
  if (key === "Escape") $("stop").click();
};
$("picture").onchange = (event) => {
  if (event.target.files[0]) choosePicture(event.target.files[0]);
  event.target.value = "";
};
$("remove").onclick = () => setPicture(null);
$("ask").onclose = () => {
  sessionStorage.setItem("token", $("token").value);
  start();
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = () => document.body.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) choosePicture(file);
};
start();
