// A js-libp2p peer for test_js.py. Talks in lines of JSON: on stdout what happened, on stdin what to do.
// Run from a folder whose node_modules has what package.json names. Arguments: noise or tls, tcp or ws.
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const load = (name) => import(pathToFileURL(`${process.cwd()}/node_modules/${name}/dist/src/index.js`).href)
const { createLibp2p } = await load('libp2p')
const { gossipsub } = await load('@libp2p/gossipsub')
const { identify, identifyPush } = await load('@libp2p/identify')
const { noise } = await load('@libp2p/noise')
const { ping } = await load('@libp2p/ping')
const { tcp } = await load('@libp2p/tcp')
const { tls } = await load('@libp2p/tls')
const { webSockets } = await load('@libp2p/websockets')
const { yamux } = await load('@libp2p/yamux')
const { multiaddr } = await load('@multiformats/multiaddr')

const say = (value) => console.log(JSON.stringify(value))
const node = await createLibp2p({
  addresses: { listen: [process.argv[3] === 'ws' ? '/ip4/127.0.0.1/tcp/0/ws' : '/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), webSockets()],
  connectionEncrypters: [process.argv[2] === 'tls' ? tls() : noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    identifyPush: identifyPush(),
    ping: ping(),
    pubsub: gossipsub({ emitSelf: false })
  }
})

// Echo: everything, then the end of file that the other side sent.
await node.handle('/echo/1.0.0', async (stream) => {
  for await (const chunk of stream) {
    if (!stream.send(chunk)) await stream.onDrain()
  }
  await stream.close()
})
node.services.pubsub.addEventListener('message', (event) => {
  say({ message: new TextDecoder().decode(event.detail.data) })
})
say({ id: node.peerId.toString(), address: node.getMultiaddrs()[0].toString().split('/p2p/')[0] })

async function readAll (stream) {
  const chunks = []
  for await (const chunk of stream) chunks.push(Buffer.from(chunk.subarray()))
  return Buffer.concat(chunks)
}

const actions = {
  async echo ({ address, size }) {
    const stream = await node.dialProtocol(multiaddr(address), '/echo/1.0.0')
    const data = Buffer.alloc(size)
    for (let i = 0; i < size; i++) data[i] = (i * 31 + (i >> 8)) & 255
    const reading = readAll(stream)
    for (let start = 0; start < size; start += 65536) {
      if (!stream.send(data.subarray(start, start + 65536))) await stream.onDrain()
    }
    await stream.close()
    return { same: data.equals(await reading) }
  },
  async ping ({ address }) {
    return { ms: await node.services.ping.ping(multiaddr(address)) }
  },
  async unknown ({ address }) {
    try {
      await node.dialProtocol(multiaddr(address), '/nobody/serves/this')
      return { error: null }
    } catch (error) {
      return { error: error.name }
    }
  },
  async protocols ({ peer, wanted = '/ipfs/ping/1.0.0' }) {
    for (;;) {
      const known = (await node.peerStore.all()).find((each) => each.id.toString() === peer)
      if (known?.protocols.includes(wanted)) return { protocols: known.protocols }
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
  },
  async serve ({ protocol }) { // identify-push tells connected peers of it
    await node.handle(protocol, (stream) => stream.close())
    return {}
  },
  async subscribe ({ topic }) {
    node.services.pubsub.subscribe(topic)
    return {}
  },
  async publish ({ topic, text, peers }) {
    while (node.services.pubsub.getSubscribers(topic).length < peers) {
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    await node.services.pubsub.publish(topic, new TextEncoder().encode(text))
    return {}
  },
  async stop () {
    await node.stop()
    process.exit(0)
  }
}
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  try {
    say({ done: command.do, ...await actions[command.do](command) })
  } catch (error) {
    say({ done: command.do, failed: String(error) })
  }
}
process.exit(0)
