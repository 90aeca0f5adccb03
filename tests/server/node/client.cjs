// Uses a server through the client for Node, and prints what it got: node client.cjs PACKAGE BASE_URL PROMPT
const [packageName, baseURL, prompt] = process.argv.slice(2);
const OpenAI = require(packageName);

async function finished(client, video) {
  while (video.status === "queued" || video.status === "in_progress") {
    await new Promise((resolve) => setTimeout(resolve, 50));
    video = await client.videos.retrieve(video.id);
  }
  return video;
}

async function main() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const settings = { size: "64x64", num_frames: 9, num_inference_steps: 2, seed: 3, guidance: { cfg_scale: 2 } };
  const created = await client.videos.create({ model: "sora-2", prompt, ...settings });
  const video = await finished(client, created);
  const content = await client.videos.downloadContent(video.id);
  const bytes = Buffer.from(await content.arrayBuffer());
  const thumbnail = await client.videos.downloadContent(video.id, { variant: "thumbnail" });
  await thumbnail.arrayBuffer();
  const remix = await finished(client, await client.videos.remix(video.id, { prompt: "a blue circle" }));
  const listed = [];
  for await (const item of client.videos.list({ limit: 2 })) listed.push(item.id);
  const deleted = await client.videos.delete(video.id);
  const statusOfDeleted = await client.videos.retrieve(video.id).then(() => 200, (error) => error.status);
  console.log(JSON.stringify({
    created,
    video,
    content: bytes.toString("latin1", 4, 8),
    type: content.headers.get("content-type"),
    thumbnail: thumbnail.headers.get("content-type"),
    remix,
    listed,
    deleted,
    status_of_deleted: statusOfDeleted,
  }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
