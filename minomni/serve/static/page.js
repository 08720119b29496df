// Talks to /v1/realtime: microphone and camera to the server, words and sound back.
const RATE = 24000; // Hz, of both directions
const FRAMES_PER_S = 2; // of the camera
const EXAMPLES = [
  { text: "say the red circle is above the blue square" },
  { text: "where is the red circle", picture: "/static/scene.png" },
  { text: "what color is the circle", picture: "/static/color.png" },
  { text: "which digit is this", picture: "/static/digit.png" },
];
const ABOUT_TINY =
  "This small model knows colored shapes, handwritten digits, short clips and about 60 words. " +
  "It does not hold free conversations. Click, or say one of these:";
const PARTS = ["question read", "first speech code", "first sound made", "sent and played"];

const $ = (id) => document.getElementById(id);
const state = {
  socket: null,
  context: null,
  capture: null,
  player: null,
  analyser: null,
  camera: null,
  picture: null, // data: URL of the next question
  mode: "hold", // or "open"
  listening: false,
  answer: null, // the answer that arrives or plays
  askedAt: 0, // when the question ended
};
window.minomni = { state, played: [], errors: [] }; // for tests

// ------------------------------------------------------------------------------------ conversation
function say(role, text, picture) {
  const entry = document.createElement("li");
  entry.className = role;
  const words = document.createElement("span");
  words.textContent = text;
  if (picture) {
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "your picture";
    entry.append(image);
  }
  entry.append(words);
  $("log").append(entry);
  $("log").scrollTop = $("log").scrollHeight;
  return entry;
}

function fail(message) {
  window.minomni.errors.push(message);
  say("error", message);
}

function status(text) {
  $("status").textContent = text;
}

// ------------------------------------------------------------------------------------ connection
function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function connect() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    $("ask").showModal();
    return;
  }
  const [model] = (await response.json()).data;
  for (const voice of model.voices) $("voice").append(new Option(voice, voice));
  $("voice").disabled = !model.speech;
  if (model.trained_here) showExamples();
  else $("examples").hidden = true;

  const address = new URL("/v1/realtime", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.searchParams.set("model", model.id);
  const token = sessionStorage.getItem("token");
  const protocols = ["realtime", ...(token ? [`openai-insecure-api-key.${token}`] : [])];
  const socket = new WebSocket(address, protocols);
  state.socket = socket;
  socket.onopen = () => {
    status(`${model.id} is ready`);
    send({ type: "session.update", session: { type: "realtime", ...turnDetection() } });
  };
  socket.onclose = () => status("disconnected; reload the page to begin again");
  socket.onmessage = ({ data }) => receive(JSON.parse(data));
}

function send(event) {
  if (state.socket?.readyState === WebSocket.OPEN) state.socket.send(JSON.stringify(event));
}

function turnDetection() {
  const detection = state.mode === "open" ? { type: "server_vad" } : null;
  return { audio: { input: { turn_detection: detection } } };
}

const HANDLERS = {
  "input_audio_buffer.speech_started"() {
    stopAnswer(false); // the server has stopped it already
    status("listening");
  },
  "input_audio_buffer.speech_stopped"() {
    state.askedAt = performance.now();
    say("user", "(spoken)");
    status("thinking");
  },
  "response.created"({ response }) {
    state.answer = { id: response.id, item: null, entry: null, chunks: [], playing: false };
    $("stop").disabled = false;
  },
  "response.output_item.added"({ item }) {
    state.answer.item = item.id;
    state.answer.entry = say("model", "");
    state.answer.entry.setAttribute("aria-busy", "true");
    state.player?.port.postMessage({ kind: "begin", item: item.id });
  },
  "response.output_audio_transcript.delta": addWords,
  "response.output_text.delta": addWords,
  "response.output_audio.delta"({ item_id, delta }) {
    const answer = state.answer;
    if (answer?.item !== item_id) return;
    const samples = toFloats(delta);
    answer.chunks.push(samples);
    answer.playing = true;
    status("speaking");
    state.player?.port.postMessage({ kind: "chunk", item: item_id, samples });
  },
  "response.output_audio.done"({ item_id }) {
    state.player?.port.postMessage({ kind: "complete", item: item_id });
  },
  "response.done"({ response }) {
    const answer = state.answer;
    if (answer?.id !== response.id) return;
    answer.done = true;
    answer.timings = response.timings;
    answer.entry?.removeAttribute("aria-busy");
    if (response.status === "cancelled") answer.entry?.classList.add("cut");
    if (response.status === "failed") answer.entry?.remove();
    else keepSound(answer);
    showLatency(answer);
    if (!answer.playing) finish();
  },
  error({ error }) {
    fail(error.message);
  },
};

function receive(event) {
  HANDLERS[event.type]?.(event);
}

function addWords({ item_id, delta }) {
  if (state.answer?.item !== item_id) return;
  state.answer.entry.querySelector("span").textContent += delta;
  $("log").scrollTop = $("log").scrollHeight;
}

function finish() {
  state.answer = null;
  $("stop").disabled = true;
  status(state.mode === "open" ? "listening" : "ready");
}

/** Silence the answer, and tell the server how much of it was heard. */
function stopAnswer(cancel = true) {
  const answer = state.answer;
  if (!answer) return;
  state.answer = null;
  $("stop").disabled = true;
  answer.entry?.classList.add("cut");
  answer.entry?.removeAttribute("aria-busy");
  if (answer.done) keepSound(answer);
  else if (cancel) send({ type: "response.cancel" });
  if (answer.playing) state.player?.port.postMessage({ kind: "stop" });
}

// ------------------------------------------------------------------------------------ sound
async function openSound() {
  if (state.context) return state.context.resume();
  const context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
  state.context = context;
  await context.audioWorklet.addModule("/static/playback.js");
  state.player = new AudioWorkletNode(context, "playback", { outputChannelCount: [1] });
  state.analyser = new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0.3 });
  state.player.connect(context.destination);
  state.player.connect(state.analyser);
  state.player.port.onmessage = ({ data }) => played(data);
  await context.resume();
  draw();
}

function played(data) {
  window.minomni.played.push(data);
  if (data.kind === "first" && state.answer?.item === data.item) {
    state.answer.firstMs = performance.now() - state.askedAt;
    showLatency(state.answer);
  }
  if (data.kind === "stopped" && data.item) {
    const ms = Math.floor((data.played * 1000) / RATE);
    send({ type: "conversation.item.truncate", item_id: data.item, content_index: 0,
      audio_end_ms: ms });
  }
  if (data.kind === "ended" && state.answer?.item === data.item) finish();
}

async function openMicrophone() {
  await openSound();
  if (state.capture) return;
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true },
  });
  const context = state.context;
  await context.audioWorklet.addModule("/static/capture.js");
  const source = context.createMediaStreamSource(stream);
  state.capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  source.connect(state.capture);
  source.connect(state.analyser);
  state.capture.port.onmessage = ({ data }) => {
    if (data === "end") captured();
    else send({ type: "input_audio_buffer.append", audio: toBase64(data) });
  };
}

/** All of a question that was held has been sent: ask for the answer. */
function captured() {
  if (state.mode === "open") return;
  send({ type: "input_audio_buffer.commit" });
  state.askedAt = performance.now();
  send({ type: "response.create", response: responseOptions() });
  status("thinking");
}

function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function toFloats(base64) {
  const text = atob(base64);
  const samples = new Float32Array(text.length / 2);
  for (let i = 0; i < samples.length; i++) {
    const value = text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8);
    samples[i] = (value > 32767 ? value - 65536 : value) / 32768;
  }
  return samples;
}

/** Offer the sound of an answer as a wav file. */
function keepSound(answer) {
  if (!answer.chunks.length || answer.kept) return;
  answer.kept = true;
  const length = answer.chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * length));
  const words = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  words(0, "RIFF");
  view.setUint32(4, 36 + 2 * length, true);
  words(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  words(36, "data");
  view.setUint32(40, 2 * length, true);
  let at = 44;
  for (const chunk of answer.chunks) {
    for (const sample of chunk) {
      view.setInt16(at, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
      at += 2;
    }
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([view], { type: "audio/wav" }));
  link.download = "answer.wav";
  link.textContent = `keep ${(length / RATE).toFixed(1)} s as wav`;
  const small = document.createElement("small");
  small.append(link);
  answer.entry?.append(small);
}

// ------------------------------------------------------------------------------------ questions
function responseOptions() {
  const voice = $("voice").value;
  return voice ? { audio: { output: { voice } } } : {};
}

function givePicture() {
  if (!state.picture) return;
  const content = [{ type: "input_image", image_url: state.picture }];
  send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
  say("user", "", state.picture);
  setPicture(null);
}

async function askText(text) {
  await openSound();
  stopAnswer();
  givePicture();
  const content = [{ type: "input_text", text }];
  send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
  say("user", text);
  state.askedAt = performance.now();
  send({ type: "response.create", response: responseOptions() });
  status("thinking");
}

function listen(active) {
  state.listening = active;
  state.capture?.port.postMessage({ active });
}

async function holdBegin() {
  if (state.holding) return;
  state.holding = true;
  $("hold").setAttribute("aria-pressed", "true");
  if (state.mode === "open") setOpen(false);
  try {
    await openMicrophone();
  } catch (error) {
    state.holding = false;
    $("hold").setAttribute("aria-pressed", "false");
    fail(`no microphone: ${error.message}`);
    return;
  }
  if (!state.holding) return; // let go while the browser asked for permission
  stopAnswer();
  givePicture();
  status("listening");
  state.heldAt = performance.now();
  listen(true);
}

function holdEnd() {
  if (!state.holding) return;
  state.holding = false;
  $("hold").setAttribute("aria-pressed", "false");
  if (!state.listening) return;
  if (performance.now() - state.heldAt < 200) {
    state.mode = "short"; // a click: nothing was said
    listen(false);
    setTimeout(() => {
      state.mode = "hold";
      send({ type: "input_audio_buffer.clear" });
      status("hold the button while you speak");
    }, 100);
    return;
  }
  say("user", "(spoken)");
  listen(false);
}

async function setOpen(on) {
  if (on) {
    try {
      await openMicrophone();
    } catch (error) {
      fail(`no microphone: ${error.message}`);
      return;
    }
    givePicture();
  }
  if (!on) listen(false);
  state.mode = on ? "open" : "hold";
  send({ type: "session.update", session: { type: "realtime", ...turnDetection() } });
  $("open").setAttribute("aria-pressed", String(on));
  if (on) listen(true);
  status(on ? "listening" : "ready");
}

// ------------------------------------------------------------------------------------ pictures
function setPicture(url) {
  state.picture = url;
  $("picked").hidden = !url;
  if (url) $("preview").src = url;
}

/** A picture of any size as a JPEG of at most 1024 pixels. */
async function choosePicture(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    setPicture(canvas.toDataURL("image/png").length < 700000
      ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.9));
  } catch {
    fail("this file is no picture that the browser can read");
  }
}

async function setCamera(on) {
  if (!on) {
    state.camera?.getTracks().forEach((track) => track.stop());
    clearInterval(state.frames);
    state.camera = null;
  } else {
    try {
      state.camera = await navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 } });
    } catch (error) {
      fail(`no camera: ${error.message}`);
      return;
    }
    $("view").srcObject = state.camera;
    await $("view").play();
    state.frames = setInterval(sendFrame, 1000 / FRAMES_PER_S);
  }
  $("view").hidden = !on;
  $("camera").setAttribute("aria-pressed", String(on));
}

function sendFrame() {
  if (!state.listening) return;
  const view = $("view");
  const canvas = document.createElement("canvas");
  canvas.width = 320;
  canvas.height = Math.round((320 * view.videoHeight) / view.videoWidth) || 240;
  canvas.getContext("2d").drawImage(view, 0, 0, canvas.width, canvas.height);
  const [, image] = canvas.toDataURL("image/jpeg", 0.85).split(",");
  send({ type: "input_video_frame.append", image });
}

// ------------------------------------------------------------------------------------ pictures of sound
const melRow = (hz) => 2595 * Math.log10(1 + hz / 700);

function draw() {
  requestAnimationFrame(draw);
  const style = getComputedStyle(document.body);
  const ink = style.getPropertyValue("color");
  const wave = $("wave").getContext("2d");
  const samples = new Float32Array(state.analyser.fftSize);
  state.analyser.getFloatTimeDomainData(samples);
  const { width, height } = wave.canvas;
  wave.clearRect(0, 0, width, height);
  wave.strokeStyle = ink;
  wave.beginPath();
  samples.forEach((sample, i) => {
    wave.lineTo((i * width) / samples.length, height / 2 - sample * height * 0.9);
  });
  wave.stroke();

  const levels = new Float32Array(state.analyser.frequencyBinCount);
  state.analyser.getFloatFrequencyData(levels);
  const mel = $("mel").getContext("2d");
  const rows = 64;
  const step = 2;
  mel.drawImage(mel.canvas, -step, 0);
  const top = melRow(8000);
  for (let row = 0; row < rows; row++) {
    const hz = 700 * (10 ** ((top * (row + 0.5)) / rows / 2595) - 1);
    const level = levels[Math.round((hz * state.analyser.fftSize) / RATE)];
    const light = Math.max(0, Math.min(1, (level + 100) / 70));
    mel.fillStyle = `hsl(${260 - 220 * light} 75% ${8 + 60 * light}%)`;
    const size = mel.canvas.height / rows;
    mel.fillRect(mel.canvas.width - step, mel.canvas.height - (row + 1) * size, step, size + 1);
  }
}

/** From the end of the question to the first sound, in four parts. */
function showLatency(answer) {
  const times = answer.timings;
  if (!times || times.audio == null || answer.firstMs === undefined) return;
  const ms = [times.prefill, times.code - times.prefill, times.audio - times.code].map(
    (seconds) => Math.max(0, seconds * 1000),
  );
  ms.push(Math.max(0, answer.firstMs - ms[0] - ms[1] - ms[2]));
  const total = ms.reduce((sum, part) => sum + part, 0);
  const bars = $("bar").children;
  $("latency").replaceChildren(`${Math.round(total)} ms: `);
  ms.forEach((part, i) => {
    bars[i].style.width = `${(100 * part) / total}%`;
    const label = document.createElement("span");
    label.className = `part${i + 1}`;
    label.textContent = `${PARTS[i]} ${Math.round(part)}`;
    $("latency").append(label);
  });
  window.minomni.latency = ms;
}

// ------------------------------------------------------------------------------------ controls
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
      if (picture) await choosePicture(await (await fetch(picture)).blob());
      await askText(text);
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
  if ([" ", "Enter"].includes(event.key)) holdEnd();
};
$("hold").onblur = holdEnd;
// Screen readers press a button without pointer or key: the first press begins, the next one ends.
$("hold").onclick = (event) => {
  if (event.detail === 0) state.holding ? holdEnd() : holdBegin();
};
$("open").onclick = () => setOpen(state.mode !== "open");
$("camera").onclick = () => setCamera(!state.camera);
$("stop").onclick = () => {
  stopAnswer();
  status("stopped");
};
$("picture").onchange = (event) => {
  if (event.target.files[0]) choosePicture(event.target.files[0]);
  event.target.value = "";
};
$("remove").onclick = () => setPicture(null);
$("ask").onclose = () => {
  sessionStorage.setItem("token", $("token").value);
  connect();
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
connect().catch((error) => fail(`the server does not answer: ${error.message}`));
